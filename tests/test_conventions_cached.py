"""Public callables that read a cache are taken as they are, and what goes wrong in it is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from public_cached import MADE, BatchPrefillWithPagedKVCacheWrapper, Steps
from torch import Tensor

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.storage import UNUSED, Storage, laid_out
from pytest_attnheat.contract.checks import CHECKS


class _LastPageWhole(Steps):
    def length(self, b: int, lengths: Tensor) -> int:
        return -(-int(lengths[b]) // 4) * 4

    def corner(self, b: int, keys: int, queries: int, lengths: Tensor) -> int:
        return int(lengths[b]) - queries


class _LastPageDropped(Steps):
    def length(self, b: int, lengths: Tensor) -> int:
        return int(lengths[b]) // 4 * 4

    corner = _LastPageWhole.corner


class _StaleTail(Steps):
    def length(self, b: int, lengths: Tensor) -> int:
        return int(lengths.max())

    corner = _LastPageWhole.corner


class _OneLong(Steps):
    def length(self, b: int, lengths: Tensor) -> int:
        return int(lengths[b]) + (int(lengths[b]) > 0)


class _BeforeAppend(Steps):
    new = 0

    def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
        self.new = len(new)
        super().append(pool, slots, new, kept)

    def length(self, b: int, lengths: Tensor) -> int:
        count, self.new = int(lengths[b]) - self.new, self.new * (b + 1 < len(lengths))
        return count


class _WindowPageLost(Steps):
    def begin(self, i: int, stand: int, left: int, page: int) -> int:
        first = super().begin(i, stand, left, page)
        return first if left < 0 else -(-first // page) * page


class _WindowTooWide(Steps):
    def begin(self, i: int, stand: int, left: int, page: int) -> int:
        return super().begin(i, stand, left + (left >= 0), page)


class _WindowTooNarrow(Steps):
    def begin(self, i: int, stand: int, left: int, page: int) -> int:
        return super().begin(i, stand, left - (left >= 0), page)


class _WindowIgnored(Steps):
    def begin(self, i: int, stand: int, left: int, page: int) -> int:
        return 0


class _Restarted(Steps):
    def corner(self, b: int, keys: int, queries: int, lengths: Tensor) -> int:
        return 0


class _CornerOfLongest(Steps):
    def corner(self, b: int, keys: int, queries: int, lengths: Tensor) -> int:
        return int(lengths.max()) - queries


class _OfAnother(Steps):
    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        return super().slots(b - 1, count, table, page)


class _OfFirst(Steps):
    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        return super().slots(0, count, table, page)


class _InOrder(Steps):
    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        start = b * table.shape[1] * page
        return torch.arange(start, start + count)


class _Wraps(Steps):
    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        return super().slots(b, count, table, page).to(torch.uint8).long()


class _ValuesOfAnother(Steps):
    table = torch.zeros(0)

    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        self.table, self.page = table, page
        return super().slots(b, count, table, page)

    def cells(self, keys: Tensor, values: Tensor, slots: Tensor, b: int) -> tuple[Tensor, Tensor]:
        others = Steps.slots(self, b - 1, len(slots), self.table, self.page)
        return keys[slots], values[others]


class _Layout(Steps):
    page = 16

    def slots(self, b: int, count: int, table: Tensor, page: int) -> Tensor:
        self.page = page
        return super().slots(b, count, table, page)

    def cells(self, keys: Tensor, values: Tensor, slots: Tensor, b: int) -> tuple[Tensor, Tensor]:
        def turned(pool: Tensor) -> Tensor:
            heads, width = pool.shape[1:]
            pages = pool.reshape(-1, heads, self.page, width)
            return pages.transpose(1, 2).reshape(-1, heads, width)[slots]

        return turned(keys), turned(values)


class _LeftIgnored(Steps):
    def left(self, padding: int) -> int:
        return 0


class _Lost(Steps):
    def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
        pass


class _TooFar(Steps):
    def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
        super().append(pool, slots, new, kept + 1)


class _ToTheFront(Steps):
    def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
        super().append(pool, slots, new, 0)


class _TreeIgnored(Steps):
    def keep(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask)


class _AddedTo(Steps):
    def into(self, out: Tensor, rows: slice, result: Tensor, keys: int) -> None:
        out[rows] += result


class _LeftWhereEmpty(Steps):
    def into(self, out: Tensor, rows: slice, result: Tensor, keys: int) -> None:
        if keys:
            out[rows] = result


# What is wrong, of which function, and the one call that tells; what it leaves out is ordinary.
WRONG: list[tuple[str, str, type[Steps], str]] = [
    ("cache_last_page_whole", "flash_attn_3_cache", _LastPageWhole, ""),
    ("cache_last_page_dropped", "flash_attn_3_cache", _LastPageDropped, ""),
    ("cache_stale_tail", "vllm_flash_attn", _StaleTail, "ragged=unequal"),
    ("cache_length_off_by_one", "vllm_flash_attn", _OneLong, "ragged=unequal"),
    ("cache_length_before_append", "flash_attn_cache", _BeforeAppend, "append=3 causal=True"),
    ("cache_window_page_lost", "vllm_unified_attention", _WindowPageLost, "window=left"),
    ("window_left_too_wide", "vllm_flash_attn", _WindowTooWide, "window=left causal=True"),
    ("window_left_too_narrow", "sglang_extend", _WindowTooNarrow, "window=left causal=True"),
    ("window_ignored", "flash_attn_3_cache", _WindowIgnored, "window=left causal=True"),
    ("causal_other_corner", "vllm_flash_attn", _Restarted, "alibi=True causal=True"),
    ("cache_corner_of_longest", "vllm_unified_attention", _CornerOfLongest, "ragged=unequal"),
    ("cache_table_of_another", "flashinfer_paged", _OfAnother, ""),
    ("cache_table_of_first", "trtllm_decode", _OfFirst, ""),
    ("cache_table_ignored", "vllm_flash_attn", _InOrder, ""),
    ("cache_row_ignored", "flash_attn_cache", _InOrder, ""),
    ("cache_offset_wraps", "flash_attn_3_cache", _Wraps, ""),
    ("cache_values_of_another", "vllm_flash_attn", _ValuesOfAnother, ""),
    ("cache_layout", "vllm_unified_attention", _Layout, ""),
    ("cache_left_padding_ignored", "flash_attn_cache", _LeftIgnored, "left=True"),
    ("cache_appended_lost", "flash_attn_3_cache", _Lost, "append=3"),
    ("cache_appended_too_far", "flash_attn_cache", _TooFar, "append=3"),
    ("cache_shared_page_written", "flash_attn_3_cache", _ToTheFront, "append=3 shared=True"),
    ("mask_ignored", "flashinfer_paged", _TreeIgnored, "mask=boolean"),
    ("mask_ignored", "sglang_extend", _TreeIgnored, "mask=boolean ragged=unequal"),
    ("cache_table_of_another", "flash_mla", _OfAnother, "lengths=True"),
    ("cache_stale_tail", "flash_mla", _StaleTail, "lengths=True"),
    ("cache_table_of_another", "vllm_unified_attention", _OfAnother, ""),
    ("cache_table_ignored", "vllm_unified_attention", _InOrder, ""),
    ("cache_last_page_whole", "flashinfer_paged", _LastPageWhole, ""),
    ("cache_last_page_dropped", "flashinfer_paged", _LastPageDropped, ""),
    ("cache_values_of_another", "flashinfer_paged", _ValuesOfAnother, ""),
    ("window_left_too_wide", "flashinfer_paged", _WindowTooWide, "window=left causal=True"),
    ("causal_other_corner", "sglang_extend", _Restarted, "causal=True"),
    ("window_left_too_wide", "sglang_extend", _WindowTooWide, "window=left causal=True"),
    ("cache_values_of_another", "flash_mla", _ValuesOfAnother, "lengths=True"),
    ("cache_table_ignored", "flash_mla", _InOrder, "lengths=True"),
    ("cache_length_off_by_one", "flash_mla", _OneLong, "lengths=True"),
    ("output_buffer_added_to", "sglang_extend", _AddedTo, ""),
]
SENTENCES = {one.name: one.sentence for one in DEFECTS}


def replayed(made: str, steps: Steps, call: str, unused: str = "ordinary") -> str:
    """The report on one call, in float64; the lengths are those of several pages."""
    replay = f"sizes=3x39 {call} unused={unused} dtype=float64"
    return str(check_attention(MADE[made](steps), replay=replay))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("unused", UNUSED)
def test_what_is_right_passes_whatever_unused_slots_hold(made: str, unused: str) -> None:
    report = check_attention(MADE[made](Steps()), replay=f"unused={unused} dtype=float32")
    assert report.passed
    assert f"called as {made}," in str(report)


@pytest.mark.parametrize("made", ["flash_attn_3_cache", "flash_mla", "sglang_decode"])
def test_what_is_right_is_diagnosed_as_healthy(made: str) -> None:
    assert diagnose(AttentionSpec(MADE[made](Steps()), dtypes=["float64"])).healthy


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "made", "wrong", "call"), WRONG)
def test_what_goes_wrong_in_a_cache_is_named(
    name: str, made: str, wrong: type[Steps], call: str
) -> None:
    said = replayed(made, wrong(), call)
    cause = next(line for line in said.splitlines() if "  cause  " in line)
    assert SENTENCES[name] in cause or f"({name})" in cause
    assert "more that give the same" not in cause


@pytest.mark.parametrize("unused", ["nan", "large"])
@pytest.mark.parametrize(("made", "wrong"), [("vllm_flash_attn", _StaleTail),
                                             ("flash_attn_cache", _LeftIgnored)])  # fmt: skip
def test_poison_shows_what_is_read_that_no_sequence_has(
    unused: str, made: str, wrong: type[Steps]
) -> None:
    call = {"vllm_flash_attn": "ragged=unequal", "flash_attn_cache": "left=True"}[made]
    said = replayed(made, wrong(), call, unused)
    assert "elements of the output are not those" in said
    assert ("a slot of the cache that no sequence uses is read" in said) == (unused == "nan")


def test_a_buffer_that_is_left_as_it_was_is_said_to_be() -> None:
    said = replayed("flashinfer_paged", _LeftWhereEmpty(), "ragged=withoutkeys")
    assert "each is what the buffer of the output held before" in said


def test_a_cache_that_is_written_to_elsewhere_fails_though_the_output_is_right() -> None:
    class Careless(Steps):
        def append(self, pool: Tensor, slots: Tensor, new: Tensor, kept: int) -> None:
            super().append(pool, slots, new, kept)
            pool[slots[kept + len(new)]] = 0.0

    assert "(cache_overwritten)" in replayed("flash_attn_cache", Careless(), "append=3")
    found = diagnose(AttentionSpec(MADE["flash_attn_cache"](Careless()), dtypes=["float64"]))
    assert found.defects == ("cache_overwritten",)
    assert "gives the output of attention as declared, but in its cache" in found.sentence


@pytest.mark.parametrize(("made", "change", "says"), [
    ("flash_attn_cache", lambda lse: lse / math.log(2.0), "(batch, heads, query_len), base 2"),
    ("flash_attn_3_cache", lambda lse: lse.mT, "it is (batch, query_len, heads), base e"),
    ("trtllm_context", lambda lse: lse * math.log(2.0), "(batch, heads, query_len), base e"),
    ("flash_mla", lambda lse: -lse.abs().where(lse.isinf(), -lse), "has not +inf"),
])  # fmt: skip
def test_a_log_sum_exp_of_another_convention_is_called_what_it_is(
    made: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    right = MADE[made](Steps())

    @wraps(right)
    def other(*given: Any, **named: Any) -> Any:
        answer = right(*given, **named)
        return (answer[0], change(answer[1])) if isinstance(answer, tuple) else answer

    (check,) = [one for one in CHECKS if one.name == "returned_lse"]
    spec = AttentionSpec(other, dtypes=["float32"])
    assert check_attention(replace(spec, subject=right), checks=[check]).passed
    (result,) = check_attention(spec, checks=[check]).failed
    assert says in result.message


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_wrapper_is_asked_in_the_layout_that_it_was_made_for(layout: str) -> None:
    wrapper = BatchPrefillWithPagedKVCacheWrapper(Steps(), layout)
    assert check_attention(wrapper, replay="ragged=unequal dtype=float32").passed


def test_a_tree_is_a_mask_for_each_sequence_one_after_the_other() -> None:
    for made in ("flashinfer_paged", "sglang_extend"):
        asked = "sizes=5x9 mask=boolean ragged=unequal dtype=float32"
        assert check_attention(MADE[made](Steps()), replay=asked).passed


def test_stored_calls_are_named_by_text() -> None:
    assert '--attn-replay="sizes=3x39 pages=5 unused=nan dtype=' in str(
        check_attention(MADE["flash_attn_3_cache"](_LastPageWhole()),
                        replay="sizes=3x39 pages=5 unused=nan")
    )  # fmt: skip


def test_the_text_of_a_cache_is_refused_where_nothing_is_stored() -> None:
    report = check_attention(torch.nn.functional.scaled_dot_product_attention, replay="append=3")
    assert not report.asked


@pytest.mark.parametrize("page", [0, 4])
def test_what_is_laid_out_can_be_gathered_again(page: int) -> None:
    key, value = torch.randn(2, 3, 2, 11, 5, dtype=torch.float64)
    lengths, queries = torch.tensor([11, 0, 6]), torch.tensor([2, 1, 3])
    cache = laid_out(Storage(page, 2, left=True, unused="nan"), key, value, queries, lengths)
    for b, count in enumerate(lengths.tolist()):
        for j in range(count):
            at = int(cache.first[b]) + j
            slot = int(cache.table[b, at // cache.page]) * cache.page + at % cache.page
            torch.testing.assert_close(cache.after[0][slot], key[b, :, j])
            torch.testing.assert_close(cache.after[1][slot], value[b, :, j])
    assert int(cache.after[0].isfinite().all((1, 2)).sum()) == int(lengths.sum())


def test_sequences_share_the_pages_of_what_is_alike_and_no_others() -> None:
    key, value = torch.randn(2, 2, 1, 12, 3, dtype=torch.float64)
    key[1, :, :9], value[1, :, :9] = key[0, :, :9], value[0, :, :9]
    count = torch.tensor([12, 12])
    cache = laid_out(Storage(4, 1, shared=True), key, value, count, count)
    assert (cache.table[0] == cache.table[1]).tolist() == [True, True, False, False]


def test_a_decoder_that_takes_less_is_asked_what_it_takes():
    def decode(q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None,
               causal=False):  # fmt: skip
        return MADE["flash_attn_cache"](Steps())(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=block_table,
            softmax_scale=softmax_scale, causal=causal,
        )  # fmt: skip

    asked = [one for one in CHECKS if one.name in ("plain", "causal", "stored", "lengths")]
    report = check_attention(AttentionSpec(decode, dtypes=("float32",)), checks=asked)
    assert report.spec.like == "flash_attn_cache"
    assert report.passed, str(report)
    assert {one.status for one in report.results} == {"passed"}


def test_the_pages_of_another_sequence_are_named_of_what_takes_rows_as_well():
    def decode(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_batch_idx=None,
               block_table=None, softmax_scale=None, causal=False):  # fmt: skip
        table = None if block_table is None else block_table.roll(1, 0)
        return MADE["flash_attn_cache"](Steps())(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx, block_table=table, softmax_scale=softmax_scale,
            causal=causal,
        )  # fmt: skip

    found = diagnose(AttentionSpec(decode, dtypes=("float32",)))
    assert found.defects == ("cache_table_of_another",), found.sentence
