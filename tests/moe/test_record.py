"""A recorder keeps what every token chose, window by window, until it is closed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe import MoE, MoEConfig, Recorder
from routing import Capacity, Drop, Dropless, ExpertChoice, Select, TopK

pytestmark = pytest.mark.fast


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [MoE(MoEConfig(dim=6, hidden=4, num_experts=experts, top_k=k)) for experts, k in ((8, 2), (5, 3))]
        )

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, valid)
        return x


def test_a_trace_holds_every_choice_in_its_window_and_no_padding() -> None:
    net, choices = Net(), []
    net.layers[0].observe(lambda choice, assignment: choices.append(choice.expert_TK))  # type: ignore[operator]
    with Recorder(net) as recorder:
        net(torch.randn(7, 6))
        recorder.end_window("prose")
        net(torch.randn(2, 3, 6), valid=torch.tensor([[True, True, False]] * 2))
        net(torch.randn(1, 6))
        recorder.end_window("code")
    net(torch.randn(9, 6))
    trace = recorder.trace()
    assert trace.load_WLE.shape == (2, 2, 8)
    assert trace.load_WLE.sum(axis=2).tolist() == [[14.0, 21.0], [10.0, 15.0]]
    assert trace.name_W == ("prose", "code")
    assert trace.window_T is not None
    assert trace.window_T.tolist() == [0] * 7 + [1] * 5
    assert trace.expert_TLK is not None
    heard = torch.cat(choices[:3])
    assert trace.expert_TLK[:, 0, :2].tolist() == heard[(heard >= 0).all(dim=1)].tolist()
    assert (trace.expert_TLK[:, 0, 2] == -1).all(), "top-2 has no third choice"


def test_a_trace_needs_windows_and_layers() -> None:
    net = Net()
    recorder = Recorder(net)
    net(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"\[0, 0\] tokens in 0 windows that ended"):
        recorder.trace()
    net.layers[0](torch.randn(2, 6))
    recorder.end_window()
    with pytest.raises(ValueError, match=r"\[5, 3\] tokens in 1 windows"):
        recorder.trace()
    with pytest.raises(ValueError, match="no MoE layer"):
        Recorder(nn.Linear(2, 2))


@pytest.mark.parametrize("select, drop", [(ExpertChoice(), Dropless()), (TopK(), Capacity(factor=0.7))])
def test_rows_of_any_shape_are_recorded(select: Select, drop: Drop) -> None:
    """Experts that choose, and experts that drop, leave tokens with any number of rows, or none."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(dim=6, hidden=4, num_experts=8, top_k=2, select=select, drop=drop))
    loads = []
    layer.observe(lambda choice, assignment: loads.append(choice.load_E))
    with Recorder(layer) as recorder:
        for length in (5, 16):
            layer(torch.randn(2, length, 6) + torch.randn(6))
            recorder.end_window()
    trace = recorder.trace()
    assert trace.load_WLE[:, 0].tolist() == torch.stack(loads).tolist()
    assert trace.expert_TLK is not None
    for experts in trace.expert_TLK[:, 0].tolist():
        kept = [expert for expert in experts if expert >= 0]
        assert len(set(kept)) == len(kept) > 0
