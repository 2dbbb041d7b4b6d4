from __future__ import annotations

import torch

from qprobe.formats.library import compiling_late


def double(x: int) -> int:
    return 2 * x


def test_torch_compiles_what_it_was_handed_meanwhile_once_it_is_called(monkeypatch) -> None:
    compiled = []

    def compile_now(function, **options):
        compiled.append((function, options))
        return lambda x: function(x) + 1  # tells the compiled function from the plain one

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_late():
        plain, chosen = torch.compile(double), torch.compile(dynamic=False)(double)
    assert torch.compile is compile_now
    assert compiled == []
    assert [plain(3), plain(4), chosen(3)] == [7, 9, 7]
    assert compiled == [(double, {}), (double, {"dynamic": False})]
