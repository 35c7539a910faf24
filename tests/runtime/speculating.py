"""What the speculation tests share: prompts of a batch, and what the target says alone."""

import tiny_decoders
import torch

from qpass.runtime.speculate import Speculator

NEW = 40


def batch_of(lengths):
    """Left-padded prompts and their mask."""
    rows = [tiny_decoders.prompt(n, seed=n) for n in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return rows, ids, mask


def plain(decoder, ids, new=NEW, **options):
    return Speculator(decoder).generate(ids, max_new_tokens=new, **options).new_tokens[0]
