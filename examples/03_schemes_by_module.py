"""A scheme for each module: by pattern or by a function of its name; as a decorator on a class.

python examples/03_schemes_by_module.py
"""

import torch
from torch import nn

import qpass


@qpass.compile(scheme={"*.up": "w4a16-g64", "*.down": "w4a8-g64", "head": "w8a16"})
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(256, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


net = Net().to(torch.bfloat16).eval()
print(net(torch.randn(4, 256, dtype=torch.bfloat16)).shape)
print(qpass.explain(net))
