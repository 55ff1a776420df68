"""A server's decoding loop over a paged KV cache: requests join and leave, all that run share one batch.

Keys and values lie in pages that an allocator hands out. `flash_attn_with_kvcache` rotates and appends the
new ones and attends to all of a request's pages, in one call for the whole batch. The model has random
weights, so that what it writes means nothing; in the end its choices are compared with those of attention
without a cache.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.layers.rotary import apply_rotary_emb

try:
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"{error}: pip install '.[examples]'") from None

VOCABULARY = 256
ARRIVALS_PER_STEP = 0.5
CHECKED = 4
"""Requests that are computed again without a cache."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer: q (b, s, h, d), k and v (b, s, hk, d) of new tokens -> (b, s, h, d)."""


class Block(nn.Module):
    """Attention with grouped queries and an MLP, each added to the residual stream after a normalisation."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.sizes = [heads, kv_heads, kv_heads]
        self.qkv = nn.Linear(width, width // heads * sum(self.sizes), bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for linear in (self.qkv, self.project):  # large: what a token attends to shall decide what follows it
            nn.init.normal_(linear.weight, std=4 * width**-0.5)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (sum(self.sizes), -1))
        x = x + self.project(attend(layer, *qkv.split(self.sizes, dim=-2)).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """A decoder with rotary embedding; its forward returns the logits (b, s, VOCABULARY) of tokens (b, s)."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.heads, args.kv_heads) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        return self.head(self.norm(x))


class Pages:
    """The KV cache of all layers, in pages, and the list of those that are free."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        shape = args.layers, 2, args.pages, args.page_size, args.kv_heads, args.width // args.heads
        self.cache = torch.zeros(shape, device=args.device, dtype=dtype)
        self.size, self.free = args.page_size, list(range(args.pages))

    def take(self, keys: int) -> list[int] | None:
        """Hand out pages for that many keys, None if too few are free."""
        count = -(-keys // self.size)
        return [self.free.pop() for _ in range(count)] if count <= len(self.free) else None

    def give(self, pages: list[int]) -> None:
        self.free += pages


@dataclass
class Request:
    """A prompt and what was generated after it; `cached` of its tokens have their keys in `pages`."""

    prompt: list[int]
    wanted: int
    arrival: int
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def done(self) -> bool:
        return len(self.generated) == self.wanted


class Server:
    """Admits requests as pages allow, gives each its first token, then one token to all at every step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        torch.manual_seed(args.seed)
        self.model = Model(args).to(args.device, self.dtype)
        self.pages = Pages(args, self.dtype)
        self.cos, self.sin = rotary_tables(args, self.dtype)
        self.running: list[Request] = []

    @torch.no_grad()
    def step(self, waiting: deque[Request]) -> list[Request]:
        """Advance every request by one token; return those that are done, whose pages are free again."""
        while waiting and self._admit(waiting[0]):
            self.running.append(waiting.popleft())
            self._advance(self.running[-1:], self.running[-1].prompt)
        unfinished = [request for request in self.running if not request.done]
        if unfinished:
            self._advance(unfinished)
        finished = [request for request in self.running if request.done]
        for request in finished:
            self.pages.give(request.pages)
        self.running = [request for request in self.running if not request.done]
        return finished

    def _admit(self, request: Request) -> bool:
        # All pages at once: a request that runs never has to wait for one.
        pages = self.pages.take(len(request.prompt) + request.wanted)
        request.pages = pages or []
        return pages is not None

    def _advance(self, requests: list[Request], prompt: list[int] | None = None) -> None:
        """Run the model on the last token of each request, or on the whole prompt of one."""
        tokens = [prompt] if prompt else [request.generated[-1:] for request in requests]
        longest = max(len(request.pages) for request in requests)
        table = [request.pages + [0] * (longest - len(request.pages)) for request in requests]
        lengths = [request.cached for request in requests]
        logits = self.model(
            self._tensor(tokens).long(), self._attend(self._tensor(table), self._tensor(lengths))
        )
        for request, token in zip(requests, logits[:, -1].argmax(-1).tolist(), strict=True):
            request.cached += len(tokens[0])
            request.generated.append(token)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.args.device)

    def _attend(self, table: Tensor, lengths: Tensor) -> Attend:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_pages, v_pages = self.pages.cache[layer]
            return flash_attn_with_kvcache(
                q, k_pages, v_pages, k, v, self.cos, self.sin, cache_seqlens=lengths, block_table=table,
                causal=True, rotary_interleaved=False,
            )  # fmt: skip

        return attend

    @torch.no_grad()
    def agreement(self, request: Request) -> tuple[int, int]:
        """Return how many of its tokens attention without a cache chooses too, and how many there are."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (apply_rotary_emb(x, self.cos, self.sin) for x in (q, k))
            return flash_attn_func(q, k, v, causal=True)

        tokens = self._tensor([request.prompt + request.generated]).long()
        chosen = self.model(tokens, attend)[0, len(request.prompt) - 1 : -1].argmax(-1).tolist()
        return sum(a == b for a, b in zip(chosen, request.generated, strict=True)), request.wanted


def rotary_tables(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (longest request, head_dim / 2)."""
    head_dim = args.width // args.heads
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(args.prompt + args.new), frequencies).to(args.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def make_requests(args: argparse.Namespace) -> deque[Request]:
    """Return requests of random lengths, in order of arrival."""
    generator = torch.Generator().manual_seed(args.seed)

    def random(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    requests, arrival = [], 0.0
    for _ in range(args.requests):
        arrival += random(0, int(2 / ARRIVALS_PER_STEP))[0]
        prompt = random(0, VOCABULARY - 1, *random(1, args.prompt))
        requests.append(Request(prompt, *random(1, args.new), int(arrival)))
    return deque(requests)


def serve(args: argparse.Namespace) -> tuple[Server, list[Request]]:
    """Run until every request is done and print the speed; return the server and the requests."""
    server, pending, waiting = Server(args), make_requests(args), deque[Request]()
    finished: list[Request] = []
    step, began = 0, time.perf_counter()
    with tqdm(total=args.requests, unit="request", disable=None) as bar:
        while len(finished) < args.requests:
            while pending and pending[0].arrival <= step:
                waiting.append(pending.popleft())
            done = server.step(waiting)
            finished += done
            state = f"{len(server.running)} running, {len(server.pages.free)} pages free"
            bar.set_postfix_str(state, refresh=False)
            bar.update(len(done))
            step += 1
    tokens = sum(len(request.generated) for request in finished)
    speed = tokens / (time.perf_counter() - began)
    print(f"{len(finished)} requests, {tokens} tokens, {speed:,.0f} tokens/s")
    return server, finished


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="fp32 on cpu, bf16 on cuda")
    for name, default, meaning in (
        ("requests", 24, "requests to serve"),
        ("prompt", 100, "longest prompt"),
        ("new", 60, "most tokens that a request wants"),
        ("pages", 64, "pages of the cache"),
        ("page-size", 16, "keys in a page, a multiple of 16"),
        ("layers", 2, "blocks of the model"),
        ("width", 128, "features of the model"),
        ("heads", 4, "heads of queries"),
        ("kv-heads", 2, "heads of keys and values, a divisor of heads"),
        ("seed", 0, "determines weights and requests"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (name != "seed"):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.width % args.heads or args.width // args.heads % 16 or args.heads % args.kv_heads:
        parser.error("--width / --heads must be a multiple of 16, and --kv-heads a divisor of --heads")
    if args.pages * args.page_size < args.prompt + args.new:
        parser.error(f"--pages must hold a request of {args.prompt + args.new} tokens, got {args.pages}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where torch sees no GPU, got cuda")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    server, finished = serve(args)
    same, total = (sum(x) for x in zip(*map(server.agreement, finished[:CHECKED]), strict=True))
    print(f"{same} of {total} tokens that were checked are those of attention without a cache")
    return 0 if same > 0.9 * total else 1


if __name__ == "__main__":
    raise SystemExit(main())
