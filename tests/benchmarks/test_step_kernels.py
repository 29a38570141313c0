"""benchmarks/step/kernels.py without a GPU: names, means, the table, the command's refusal."""

from __future__ import annotations

import pytest

from benchmarks.step import __main__ as command
from benchmarks.step import kernels


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::Add>(int)",
         "vectorized_elementwise_kernel"),
        ("void kbfgs::(anonymous namespace)::update_kernel<float>(kbfgs::Call)", "update_kernel"),
        ("_gram_tiles", "_gram_tiles"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy"),
        ("sm80_xmma_gemm_f32f32_tn_n", "sm80_xmma_gemm_f32f32_tn_n"),
    ],
)  # fmt: skip
def test_a_kernel_is_named_without_its_arguments(name: str, wanted: str) -> None:
    assert kernels.short(name) == wanted


def test_kernels_are_means_over_the_steps_longest_first() -> None:
    events = [("a", 1.0), ("b", 5.0), ("a", 2.0), ("a", 3.0)]
    rows = kernels.by_name(events, 2)
    assert rows == [
        {"kernel": "a", "launches": 1.5, "us": 3.0},
        {"kernel": "b", "launches": 0.5, "us": 2.5},
    ]
    table = kernels.table({"provider": "AdamW", "kernels": rows}, "net")
    assert table.title == "net, AdamW: 2 kernels, 6 us a step"
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b"], ["1.5", "0.5"], ["3.0", "2.5"],
    ]  # fmt: skip


def test_on_a_cpu_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--kernels", "--device", "cpu"])
    assert "kernels run on a GPU, the device is cpu" in capsys.readouterr().err
