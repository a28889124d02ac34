"""NVIDIA's products where they are missing or broken: each is told with the way to get it."""

from __future__ import annotations

import pytest

from arriero.errors import MachineLacks
from arriero.runtimes import tensorrt, tensorrt_rtx
from arriero.runtimes.nvidia import products


@pytest.mark.parametrize("chosen", [tensorrt.PRODUCT, tensorrt_rtx.PRODUCT])
def test_a_missing_library_is_named_with_the_way_to_get_it(chosen, monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(products, "import_module", absent)
    with pytest.raises(MachineLacks, match=rf"is not installed.*pip install 'arriero\[{chosen.extra}\]'"):
        chosen.load()

    def broken(name: str):
        raise ImportError("libnvinfer.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(products, "import_module", broken)
    command = r"Install the library libnvinfer\.so\.11 .*reinstall that: pip install --force-reinstall '(?!arriero)"
    with pytest.raises(MachineLacks, match=rf"does not load: libnvinfer\.so\.11: cannot open.*{command}"):
        chosen.load()
