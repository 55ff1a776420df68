"""Train a small GPT on the documentation that comes with Python, with flash_attn and with torch's SDPA.

A token is a byte. Both start from the same weights and see the same batches, so their losses must be nearly
the same at every step. The defaults take about a minute on a CPU (fp32); on a GPU (bf16) take larger numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn import flash_attn_func, flash_attn_varlen_func

try:
    from tabulate import tabulate
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"{error}: pip install '.[examples]'") from None

VOCABULARY = 256
LARGEST_HEAD_DIM = 256
LARGEST_SEQLEN = 65536  # shorter than the text of every Python
WARMUP_STEPS = 20


@dataclass(frozen=True)
class Batch:
    """Tokens of shape (batch, seqlen), or (total,) where documents of any length follow one another."""

    tokens: Tensor
    targets: Tensor  # the token after each token
    positions: Tensor  # of each token in its sequence
    longest: int
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32: where each document starts, then the total

    def to(self, device: torch.device) -> Batch:
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        tokens, targets, positions = (x.to(device) for x in (self.tokens, self.targets, self.positions))
        return Batch(tokens, targets, positions, self.longest, cu_seqlens)


Attention = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
"""Causal attention of q, k, v, all (*tokens.shape, heads, head_dim), within each sequence of the batch."""


def flash(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    if batch.cu_seqlens is None:
        return flash_attn_func(q, k, v, causal=True)
    cu_seqlens, longest = batch.cu_seqlens, batch.longest
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    if batch.cu_seqlens is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    # SDPA wants sequences of one length. Padding goes after each document, where the causal mask hides it.
    lengths = batch.cu_seqlens.diff()
    places = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths), batch.positions
    shape = len(lengths), batch.longest, *q.shape[1:]
    q, k, v = (x.new_zeros(shape).index_put(places, x).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)[places]


ATTENTIONS: dict[str, Attention] = {"flash": flash, "sdpa": sdpa}


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream after a normalisation."""

    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.project(self.attend(q, k, v, batch).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Pre-normalised decoder with learned positions; its forward returns the mean cross-entropy in nats."""

    def __init__(self, args: argparse.Namespace, attend: Attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, args.width)
        self.position = nn.Embedding(args.seqlen, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.heads, attend) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, VOCABULARY, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        # Small weights: the first predictions are nearly uniform, so the loss starts near log(256) = 5.55.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed(batch.tokens) + self.position(batch.positions)
        for block in self.blocks:
            x = block(x, batch)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten())


class Text:
    """Batches of Python's documentation: windows of the whole, or whole paragraphs as documents, packed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.generator = args, torch.Generator().manual_seed(args.seed)
        prose = "\n\n".join(topics.values())
        self.tokens = _tokens(prose)
        self.documents = [_tokens(paragraph + "\n\n") for paragraph in prose.split("\n\n")]

    def batch(self) -> Batch:
        return self._packed() if self.args.packed else self._windows()

    def _random(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def _windows(self) -> Batch:
        seqlen, positions = self.args.seqlen, torch.arange(self.args.seqlen + 1)
        starts = self._random(len(self.tokens) - seqlen, self.args.batch, 1)
        window = self.tokens[starts + positions]
        return Batch(window[:, :-1], window[:, 1:], positions[:-1], seqlen)

    def _packed(self) -> Batch:
        """Random documents, cut at `seqlen`, until the batch has as many tokens as one of windows."""
        pieces, left = [], self.args.batch * self.args.seqlen
        while left:
            document = self.documents[int(self._random(len(self.documents)))]
            pieces.append(document[: min(self.args.seqlen, left) + 1])
            left -= len(pieces[-1]) - 1  # the last token of a document has no target
        lengths = [len(piece) - 1 for piece in pieces]
        tokens, targets = torch.cat([x[:-1] for x in pieces]), torch.cat([x[1:] for x in pieces])
        positions = torch.cat([torch.arange(n) for n in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return Batch(tokens, targets, positions, max(lengths), cu_seqlens)


def _tokens(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


@dataclass(frozen=True)
class Run:
    """What training gave: the loss of each step in nats per byte, and the speed after the first step."""

    losses: list[float]
    seconds: float
    tokens_per_second: float


def train(name: str, args: argparse.Namespace) -> Run:
    """Train from the weights and with the batches that `args.seed` determines, whatever the attention."""
    device, text = torch.device(args.device), Text(args)
    torch.manual_seed(args.seed)
    model = GPT(args, ATTENTIONS[name]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    losses: list[float] = []
    speed, began = 0.0, time.perf_counter()
    first_ended = began
    bar = tqdm(range(1, args.steps + 1), desc=name, unit="step", disable=None)
    for step in bar:
        batch = text.batch().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(loss.item())  # waits for the GPU, so that the clock is right
        if step == 1:  # loads kernels and fills caches: not part of the speed
            first_ended = time.perf_counter()
        else:
            speed = (step - 1) * batch.tokens.numel() / (time.perf_counter() - first_ended)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
    return Run(losses, time.perf_counter() - began, speed)


def obstacle(name: str, args: argparse.Namespace) -> str | None:
    """Try attention, forward and backward, on one batch; return why it cannot train here, None if it can."""
    device = torch.device(args.device)
    batch = Text(args).batch().to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = *batch.tokens.shape, args.heads, args.width // args.heads
    q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    try:
        ATTENTIONS[name](q, k, v, batch).sum().backward()
    except RuntimeError as error:  # a GPU or a build that has no kernel for it
        return " ".join(str(error).split())
    return None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    allowed = f"an integer of at least {lowest}" + (f" and at most {highest}" if highest else "")

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--attention", choices=(*ATTENTIONS, "both"), default="both", help="whose attention to train with")
    add("--packed", action="store_true", help="pack whole paragraphs, of different lengths, into a batch")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu computes in fp32, cuda in bf16")
    add("--steps", type=integer(2), default=300, help="batches to train on")
    add("--batch", type=integer(1), default=8, help="sequences in a batch; packed: batch * seqlen tokens")
    add("--seqlen", type=integer(1, LARGEST_SEQLEN), default=256, help="bytes in a sequence; packed: at most")
    add("--layers", type=integer(1), default=4, help="blocks of the model")
    add("--width", type=integer(1), default=128, help="features of the model, a multiple of heads")
    add("--heads", type=integer(1), default=4, help="attention heads")
    add("--lr", type=learning_rate, default=1e-3, help="learning rate, reached after a linear warm-up")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="determines weights and batches")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"argument --width: must be a multiple of --heads {args.heads}, got {args.width}")
    if args.width // args.heads > LARGEST_HEAD_DIM:
        allowed = f"at most {args.heads * LARGEST_HEAD_DIM} for --heads {args.heads}"
        parser.error(f"argument --width: must be {allowed}, got {args.width}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu where torch sees no GPU, got cuda")
    args.names = tuple(ATTENTIONS) if args.attention == "both" else (args.attention,)
    for name in args.names:
        if reason := obstacle(name, args):
            parser.exit(2, f"{parser.prog}: {name} cannot train on {args.device}: {reason}\n")
    return args


def table(runs: dict[str, Run]) -> str:
    """What training gave, a row for each attention."""
    columns = ("attention", "nats per byte at first", "in the end", "tokens/s", "seconds")
    rows = [
        (name, run.losses[0], run.losses[-1], run.tokens_per_second, run.seconds)
        for name, run in runs.items()
    ]
    return tabulate(rows, columns, floatfmt=("", ".3f", ".3f", ",.0f", ".1f"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    layout = "packed paragraphs of at most" if args.packed else f"{args.batch} windows of"
    print(
        f"{args.layers} layers, width {args.width}, {args.heads} heads; {args.steps} steps, each "
        f"{args.batch * args.seqlen} bytes in {layout} {args.seqlen}; {args.device}, seed {args.seed}",
        flush=True,  # before the bars, which go to stderr
    )
    runs = {name: train(name, args) for name in args.names}
    print(table(runs))
    if len(runs) == 2:
        gaps = [abs(a - b) for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
        print(f"largest difference of the two losses at a step: {max(gaps):.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
