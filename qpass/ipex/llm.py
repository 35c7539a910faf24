"""``ipex.llm``."""

from qpass.frontends.ipex import optimize

__all__ = ["optimize"]
