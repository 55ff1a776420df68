"""Operations that flash-attn offers under `ops.triton`; here they are torch operations."""
