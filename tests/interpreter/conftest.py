"""These tests run the Triton kernels in Triton's interpreter, which has to be chosen before Triton
is imported: `TRITON_INTERPRET=1 pytest tests/interpreter`. tests/test_triton.py does that in a
process of its own."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_index_of_one_element(tensor: Any, scope: Any) -> None:
        """A loop's bound is an array of one element; Triton 3.6 calls int() on it, which numpy does
        not take from 2.4 on."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index_of_one_element
    patch_language, seen = interpreter._patch_lang, set()

    def once_in_a_launch(fn: Any) -> Any:
        """Triton goes through all of its language again at every call of a function in a kernel: a third
        of these tests' time. Only the scope of the kernel itself is ever restored."""
        scope = interpreter._LangPatchScope() if fn in seen else patch_language(fn)
        seen.add(fn)
        restore = scope.restore
        scope.restore = lambda: (restore(), seen.clear())
        return scope

    interpreter._patch_lang = once_in_a_launch

    # Triton makes and checks the shape and the type of every result anew, and for its NumPy type a table of
    # all of them: a quarter of what was left.

    def made_once(kind: type, key: Callable[..., tuple[Any, ...]], own: str | None = None) -> None:
        """One of a kind that is made of the same is the first one's copy, but for its own attribute."""
        make, made = kind.__init__, {}

        def copied(self: Any, *args: Any) -> None:
            first = made.get(name := key(*args))
            if first is None:
                make(self, *args)
                made[name] = dict(self.__dict__)
            else:
                self.__dict__.update(first)
                if own:
                    self.__dict__[own] = args[0]

        kind.__init__ = copied  # type: ignore[misc]

    def shape_of(element: Any, shape: Any) -> tuple[Any, ...]:
        return element.name, *(x.value if isinstance(x, tl.constexpr) else x for x in shape)

    made_once(tl.block_type, shape_of)
    made_once(tl.tensor, lambda handle, kind: (kind.name,), own="handle")
    get_np_dtype, dtypes = interpreter._get_np_dtype, {}

    def np_dtype(kind: Any) -> Any:
        if kind.name not in dtypes:
            dtypes[kind.name] = get_np_dtype(kind)
        return dtypes[kind.name]

    interpreter._get_np_dtype = np_dtype


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is full of NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.randn(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
