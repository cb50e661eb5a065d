"""Quantised numbers: bounded, unbiased, the same bits from the same seed; what nobody could have encoded is refused."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from helpers import arrays_of, digest, play, replayed

from fedkrso_app.config import ConfigError
from fedkrso_app.core import quantize
from fedkrso_app.core.projection import stream
from fedkrso_app.core.quantize import BLOCK, FORMATS
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

LENGTHS = [0, 1, 2, 127, 128, 129, 777]


@pytest.fixture(params=FORMATS)
def form(request) -> str:
    return request.param


def rough(n: int, rows: int = 3) -> np.ndarray:
    """Values of sizes from 1e-6 to 1e2, so that blocks have scales of their own."""
    rng = np.random.default_rng(n)
    return (rng.normal(size=(rows, n)) * 10.0 ** rng.uniform(-6, 2, size=(rows, n))).astype(np.float32)


def there_and_back(x: np.ndarray, form: str, seed: int = 0) -> np.ndarray:
    return quantize.decode(*quantize.encode(x, form, stream(seed, "test")))


def largest_error(x: np.ndarray, form: str) -> np.ndarray:
    """The bound for every value: a step of its block, from the block's largest value and not from the scales."""
    if form == "float16":
        return np.abs(x) * 2.0**-10 + np.abs(x).max(axis=-1, initial=0, keepdims=True) * 2.0**-39
    bound = np.zeros(x.shape)
    for start in range(0, x.shape[-1], BLOCK):
        part = np.abs(x[..., start : start + BLOCK]).max(axis=-1, keepdims=True)
        bound[..., start : start + BLOCK] = part / {"int8": 127, "int4": 7}[form] * (1 + 2.0**-7)
    return bound


@pytest.mark.parametrize("n", LENGTHS)
def test_no_value_moves_by_more_than_a_step_of_its_block(form, n):
    x = rough(n)
    back = there_and_back(x, form)
    assert back.shape == x.shape and back.dtype == np.float32
    assert (np.abs(back.astype(np.float64) - x) <= largest_error(x, form)).all()


def test_blocks_that_are_not_handled_at_once_keep_the_bound_too(form):
    x = rough(2 * quantize._CHUNK + 131, rows=1)
    assert (np.abs(there_and_back(x, form).astype(np.float64) - x) <= largest_error(x, form)).all()


def test_rounding_is_unbiased(form):
    """The mean over 4000 seeds, in float64, lies within 6 standard errors of every value (of at least 2^-26 of the
    largest: float16 has no random bits for what lies 2^-29 below it)."""
    x, times = rough(200, rows=1), 4000
    x[np.abs(x) < np.abs(x).max() * 2.0**-26] = 1e-3
    total = np.zeros(x.shape)
    for seed in range(times):
        total += there_and_back(x, form, seed)
    standard_error = largest_error(x, form) / 2 / np.sqrt(times)  # p(1-p) <= 1/4
    assert (np.abs(total / times - x) <= 6 * standard_error).all()
    assert (np.abs(there_and_back(x, form) - x) > 6 * standard_error).any()  # one seed alone does not


def test_the_same_generator_gives_the_same_bits_and_another_gives_others(form):
    x = rough(777)
    first, again, other = (quantize.encode(x, form, stream(seed, "test")) for seed in (1, 1, 2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert first[0].tobytes() != other[0].tobytes()


def test_no_global_random_state_is_read_or_changed(form):
    np.random.seed(0)
    before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = there_and_back(rough(777), form)
    assert (np.random.get_state()[1] == before).all() and torch.equal(torch.random.get_rng_state(), torch_before)
    np.random.seed(1)
    assert (there_and_back(rough(777), form) == first).all()


def test_zero_stays_zero(form):
    x = rough(777)
    x[:, ::3], x[1], x[2, 128:256] = 0, 0, 0
    assert (there_and_back(x, form)[x == 0] == 0).all()
    assert (there_and_back(np.full(5, 1e-38, np.float32), form) == 0).all()  # too small for a scale


@pytest.mark.parametrize("n", LENGTHS)
def test_what_lies_on_the_grid_comes_back_exactly(form, n):
    rng = np.random.default_rng(0)
    if form == "float16":
        x = rng.normal(size=(3, n)).astype(np.float16).astype(np.float32)
    else:
        top = {"int8": 127, "int4": 7}[form]
        x = rng.integers(-top, top + 1, size=(3, n)).astype(np.float32)
        x[:, ::BLOCK] = top  # so that the scale is 1
    np.testing.assert_array_equal(there_and_back(x, form), x)


def test_int4_codes_are_two_in_a_byte_as_documented():
    codes, scales = quantize.encode(np.array([7, -7, 1], np.float32), "int4", stream(0))
    assert codes.tolist() == [0xF | 0x1 << 4, 0x9] and scales.tolist() == [0x3F80]  # 1.0 is 0x3F800000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**64])
def test_what_has_no_code_is_refused_by_the_encoder(form, value):
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize.encode(np.array([1, value], np.float32), form, stream(0))


def test_codes_and_scales_cost_what_the_format_says():
    for form, bits in {"float16": 16, "int8": 8 + 16 / BLOCK, "int4": 4 + 16 / BLOCK}.items():
        codes, scales = quantize.encode(rough(10 * BLOCK), form, stream(0))
        assert codes.nbytes + scales.nbytes - (6 if form == "float16" else 0) == 3 * 10 * BLOCK * bits / 8


# On the wire


def schema(form: str) -> Schema:
    fields = {
        "k": Field("uint64", ("s",), "key"),
        "B": Field(form, ("s", 131)),
        "head": Field(form, (5,), "state", optional=True),
        "values": Field(form, ("v",)),
    }
    return Schema(fields, limits={"s": 3, "v": 300})


def good(form: str) -> dict[str, np.ndarray]:
    x = rough(131)
    arrays = {"k": np.arange(3, dtype=np.uint64), "B": x, "head": x[0, :5], "values": x.reshape(-1)[:257]}
    return wire.encode(arrays, schema(form), stream(0))


def test_encoded_arrays_survive_the_wire_bit_for_bit(form):
    arrays = good(form)
    back = wire.unpack(wire.pack(arrays), schema(form))
    assert {name: (v.dtype, v.tobytes()) for name, v in back.items()} == {
        name: (v.dtype, v.tobytes()) for name, v in arrays.items()
    }
    assert {name: v.shape for name, v in wire.decode(back).items()} == {
        "k": (3,), "B": (3, 131), "head": (5,), "values": (257,)
    }  # fmt: skip


def test_float32_is_itself_and_draws_nothing():
    rng, arrays = stream(0), {"B": rough(7)}
    plain = Schema({"B": Field("float32", ("s", 7))}, limits={"s": 3})
    assert wire.encode(arrays, plain, rng)["B"] is arrays["B"] and wire.decode(arrays)["B"] is arrays["B"]
    assert rng.bit_generator.random_raw() == stream(0).bit_generator.random_raw()
    assert plain.encoded() == plain


def put(name, index, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


SCALES = {"negative": 0x8001, "negative zero": 0x8000, "NaN": 0x7FC0, "infinite": 0x7F80, "huge": 0x5F81}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["B", "head", "values"])
def test_a_forged_scale_is_refused(form, name, scale):
    arrays = good(form)
    put(f"{name}.scales", -1, SCALES[scale])(arrays)
    with pytest.raises(Refused, match=f"{name}.*a scale is negative, not finite or above"):
        wire.unpack(wire.pack(arrays), schema(form))


FORGED = {
    "NaN code": ("float16", put("B", (0, 0), np.nan), "'B' holds NaN"),
    "infinite code": ("float16", put("head", 0, np.inf), "'head' holds NaN or infinite"),
    "unused int8 code": ("int8", put("B", (2, 130), -128), "'B': code -128"),
    "unused int4 code, low half": ("int4", put("B", (1, 3), 0xF0), "'B': code -8"),
    "unused int4 code, high half": ("int4", put("B", (1, 3), 0x0F), "'B': code -8"),
    "bits after the end": ("int4", put("head", 2, 0xFF), "'head' has 6 values in a row, expected 5"),
    "bits after the end of one row": ("int4", put("B", (1, -1), 0xFF), "'B': code -8"),
    "an even row that ends early": ("int4", put("values", -1, 0), "'values': code -8"),
    "no scales": ("int8", lambda a: a.pop("B.scales"), "'B.scales' is missing"),
    "no scales, optional": ("int8", lambda a: a.pop("head.scales"), "'head' and its scales"),
    "no codes, optional": ("int4", lambda a: a.pop("head"), "'head' and its scales"),
    "scales too few": ("int8", lambda a: a.update({"values.scales": a["values.scales"][:-1]}), "'values': scales of"),
    "scales too many": ("int4", lambda a: a.update({"B.scales": np.zeros((3, 3), np.uint16)}), "'B.scales' has shape"),
    "scales as floats": ("int8", lambda a: a.update({"head.scales": np.ones(1, np.float32)}), "dtype float32"),
    "int8 for int4": ("int4", lambda a: a.update(head=np.ones(3, np.int8)), "'head' has dtype int8, expected uint8"),
    "float32 for int8": ("int8", lambda a: a.update(head=np.ones(5, np.float32)), "dtype float32, expected int8"),
    "too long": ("int8", lambda a: a.update(values=np.ones(301, np.int8)), "at most 300"),
    "too long, packed": ("int4", lambda a: a.update(values=np.full(151, 0x99, np.uint8)), "at most 150"),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_nobody_could_have_encoded_is_refused_by_name(case):
    form, change, reason = FORGED[case]
    arrays = good(form)
    change(arrays)
    with pytest.raises(Refused, match=reason):
        wire.unpack(wire.pack(arrays), schema(form))


def test_an_unknown_format_is_refused_before_the_run(run_config):
    with pytest.raises(ConfigError, match="wire-dtype = 'int9' is not one of float32, float16, int8, int4"):
        parse(run_config | {"wire-dtype": "int9"})


# In whole runs


def test_a_forged_scale_costs_its_share_of_one_round(run_config, caplog):
    def forge(partition, message, reply):
        if partition == 2 and message.content["train"]["round"] == 2:
            arrays = arrays_of(reply)
            put("head.scales", 0, 0x7F80)(arrays)
            return Message(RecordDict({**reply.content, "update": wire.pack(arrays)}), reply_to=message)
        return reply

    def silent(partition, message, reply):
        wanted = partition != 2 or message.content["train"]["round"] != 2
        return reply if wanted else Message(Error(code=8, reason="gone"), reply_to=message)

    settings = run_config | {"wire-dtype": "int8"}
    run = play(settings, tamper=forge)
    without = play(settings | {"run-name": "without"}, tamper=silent, run_id=2)
    assert digest(run) == digest(without)
    assert "partition 2 refused: array 'head': a scale is" in caplog.text


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("strategy", ["fedkrso", "fedfft", "fedit", "ffa-lora"])
def test_the_next_entry_is_the_last_plus_the_mean_update_up_to_its_own_grid(run_config, strategy, dtype):
    """Absolute values by another route: the replies' differences in float64, added to the entry they started from."""
    replies = []
    run = play(
        run_config | {"strategy": strategy, "wire-dtype": dtype, "num-server-rounds": 2},
        tamper=lambda partition, message, reply: replies.append(reply) or reply,
    )
    last, entry = (wire.decode(Ledger(run.ledger).read(version).arrays) for version in (1, 2))
    second = [wire.decode(arrays_of(reply)) for reply in replies[4:]]
    for name in {"head", "parameters", "A", "B"} & set(entry):
        exact = last[name] + np.mean([update[name] for update in second], axis=0, dtype=np.float64)
        grid = make(run.config, Shapes.of(model.load(run.config.model, 2, 0))).entry.fields[name].dtype
        bound = largest_error(exact[None], grid)[0]
        assert (np.abs(entry[name] - exact) <= bound * 1.01 + 1e-7).all()


def test_a_heads_error_on_the_way_up_is_a_step_of_the_update_and_not_of_the_head(run_config, monkeypatch):
    from fedkrso_app.strategies.fedkrso import FedKRSOLocal

    heads, replies, session = [], [], FedKRSOLocal.session

    @contextmanager
    def watched(self, *args):
        with session(self, *args) as opened:
            yield opened
            heads.append(opened.update()["head"])

    monkeypatch.setattr(FedKRSOLocal, "session", watched)
    small = run_config | {"wire-dtype": "int8", "num-server-rounds": 1, "fedkrso.learning-rate": 1e-6}
    run = play(small, tamper=lambda partition, message, reply: replies.append(reply) or reply)
    start = wire.decode(Ledger(run.ledger).read(0).arrays)["head"]
    for head, reply in zip(heads, replies, strict=True):
        step = np.abs(head - start).max() / 127
        error = np.abs(wire.decode(arrays_of(reply))["head"] - (head - start)).max()
        assert 0 < error <= 1.01 * step < np.abs(start).max() / 127 / 100


@pytest.mark.parametrize("strategy", ["fedsrd", "fedsrd-e"])
def test_fedsrds_bitmaps_are_untouched_and_its_values_quantised(run_config, strategy):
    replies = []
    play(
        run_config | {"strategy": strategy, "wire-dtype": "int4", "num-server-rounds": 1},
        tamper=lambda partition, message, reply: replies.append(reply) or reply,
    )
    for reply in replies:
        arrays = arrays_of(reply)
        kept = int(np.unpackbits(arrays["bits"]).sum())
        assert arrays["values"].nbytes == -(-kept // 2) and len(wire.decode(arrays)["values"]) == kept
        assert kept > 0 and arrays["head"].dtype == np.int8


@pytest.mark.parametrize("strategy", ["fedsrd", "fedsrd-e"])
def test_a_sparse_head_may_be_quantised_too(run_config, strategy):
    run = play(run_config | {"strategy": strategy, "wire-dtype": "int8", "fedsrd.sparsify-head": True})
    assert replayed(run) == digest(run) and all(line["refused"] == 0 for line in run.metrics())
