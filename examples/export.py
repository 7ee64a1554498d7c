"""torch.export of a patched model: the program has torchweld's ops by name, and runs where torchweld is imported."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import torchweld  # torchweld

torch.manual_seed(0)
model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
x = torch.randn(2, 16, 64)
with torch.no_grad():
    expected = model(x)
torchweld.patch(model)  # torchweld

for p in model.parameters():
    p.requires_grad_(False)
program = torch.export.export(model, (x,), dynamic_shapes={"src": {0: torch.export.Dim("batch", min=2, max=64)}})
names = {str(node.target) for node in program.graph.nodes if "torchweld" in str(node.target)}
print(*sorted(names), sep="\n")

path = Path(tempfile.mkdtemp()) / "model.pt2"
torch.export.save(program, path)
loaded = torch.export.load(path).module()
torch.testing.assert_close(loaded(x), expected)
print("batches of 2 and 5 give", list(loaded(x).shape), "and", list(loaded(torch.randn(5, 16, 64)).shape))
