"""The optimizer of models/tiny does what PyTorch's does matrix by matrix."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_steps_equal_those_of_pytorch(monkeypatch):
    monkeypatch.syspath_prepend(TINY)
    from muon import Muon

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (10, 6), (8, 8), (6, 10))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    both = [
        Muon(ours, lr=2e-3, weight_decay=0.05),
        torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in both:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
