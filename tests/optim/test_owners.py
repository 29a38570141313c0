"""Who owns which layer, and which rows of a weight a rank has."""

from __future__ import annotations

import pytest
import torch

from kbfgs_ext import KBFGS, RankRule
from kbfgs_ext.optim import sharing
from kbfgs_ext.optim.process import Alone
from kbfgs_ext.optim.shards import pieces
from kbfgs_ext.optim.sharing import Shares, cost, share_out
from tests.optim.models import closure_of, mlp, rows


def test_the_costliest_go_first_to_who_has_least():
    loads = [0, 0]
    assert share_out([3, 9, 4, 4], loads) == [1, 0, 1, 1]
    assert loads == [9, 11]
    assert share_out([1], loads) == [0]  # a layer that comes later
    assert share_out([5, 5], [0, 0, 0]) == [0, 1]  # more ranks than layers: one owns none


def test_no_rank_has_more_than_a_fair_share_and_a_layer():
    costs = [
        int(c) for c in torch.randint(1, 100, (40,), generator=torch.Generator().manual_seed(0))
    ]
    for ranks in (2, 4, 7):
        loads = [0] * ranks
        share_out(costs, loads)
        assert sum(loads) == sum(costs)
        assert max(loads) <= sum(costs) / ranks + max(costs)


def test_blocks_cost_less_than_whole_sides():
    def costs(**options):
        return [cost(layer) for layer in KBFGS(mlp(64, 128, 3), **options).layers]

    whole, blocks = costs(block_size=None), costs(block_size=16)
    assert blocks[0] < whole[0]
    n_g, n_a = 128, 65
    assert whole[0] == (
        2 * n_g * n_a * n_g + 4 * n_g * n_a**2 + 16 * n_a**3 + 8 * (n_g**2 + n_a**2)
    )


def test_what_sharing_spares_and_sends():
    layers = KBFGS(mlp(63, 64, 64, 64, dtype=torch.float32)).layers  # 64 x 64, 64 x 65, 64 x 65
    a, b = cost(layers[0]), cost(layers[1])
    shares = Shares.of(layers, 2)
    assert shares.flops == a + 2 * b and shares.most == a + b
    assert shares.sent == 4 * 64 * (64 + 2 * 65)
    assert shares.spared == b / shares.sent
    usage = KBFGS(mlp(63, 64, 64, 64, dtype=torch.float32)).memory_usage()
    matrices = usage["M"] + usage["H_a"] + usage["H_g"]
    assert matrices <= shares.kept <= matrices + usage["vectors"]
    assert shares.kept < 2 * shares.heaviest < 2 * shares.kept
    said = str(shares)
    assert f"{shares.spared:.0f} FLOPs a byte" in said and "shares from 1000" in said


def test_auto_shares_what_is_large(monkeypatch):
    """The longer the sides and the more the ranks; one layer cannot be shared, however large."""

    def pays(*sizes, ranks=2):
        return Shares.of(KBFGS(mlp(*sizes, dtype=torch.float32)).layers, ranks).pays

    assert not pays(64, 64, 64) and pays(1024, 1024, 1024)
    assert not pays(1024, 1024)
    assert not pays(*[256] * 9) and pays(*[256] * 9, ranks=8)
    monkeypatch.setattr(sharing, "FLOPS_PER_BYTE", 100)
    assert pays(256, 256, 256)


def test_what_shared_work_takes():
    for wrong in ("always", None, 3):
        with pytest.raises(ValueError, match="shared_work must be one of"):
            RankRule(shared_work=wrong)
    opt = KBFGS(mlp(4, 3), ranks=RankRule(shared_work="auto"))
    assert type(opt.steps.process) is Alone and not opt.steps.process.explain()


def test_one_process_exchanges_nothing():
    """A collective would raise: torch.distributed has no group."""
    model = mlp(5, 4, 3)
    opt = KBFGS(model, pair_every=2)
    assert type(opt.steps.process) is Alone and not torch.distributed.is_initialized()
    losses = [opt.step(closure_of(model, opt, rows(8, 5), rows(8, 3))) for _ in range(3)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_pieces_are_those_of_torch(n, ranks):
    rows = torch.arange(n)
    theirs = [part.tolist() for part in rows.chunk(ranks)]
    ours = [rows[piece].tolist() for piece in pieces(n, ranks)]
    assert ours == theirs + [[]] * (ranks - len(theirs))
