"""Seeds are derived from what they are for, never from the state of a process."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed of the given path, such as (run seed, branch, step, prompt id, slot)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
