"""The ledger: whole entries or none, in order, and damage is seen."""

import numpy as np
import pytest

from fedkrso_app.records.ledger import Entry, Ledger, LedgerError, digest


def entry(version: int) -> Entry:
    rng = np.random.default_rng(version)
    arrays = {
        "seeds": rng.integers(2**64, size=version, dtype=np.uint64),
        "B": rng.normal(size=(version, 3)).astype("f4"),
    }
    return Entry(version, arrays, {"round": version, "partitions": [0, 1]})


def filled(folder, count: int) -> Ledger:
    ledger = Ledger(folder)
    for version in range(count):
        ledger.append(entry(version))
    return ledger


def test_what_is_read_is_what_was_appended(tmp_path):
    ledger = filled(tmp_path, 3)
    for version in range(3):  # version 0 has empty arrays
        read = ledger.read(version)
        assert read.version == version and read.record == entry(version).record
        assert digest(read.arrays) == digest(entry(version).arrays)


def test_a_new_ledger_is_at_no_version_and_a_reopened_one_at_its_last(tmp_path):
    assert Ledger(tmp_path).version == -1
    filled(tmp_path, 3)
    assert Ledger(tmp_path).version == 2


@pytest.mark.parametrize("version", [0, 2, 4])
def test_an_entry_that_does_not_follow_is_refused(tmp_path, version):
    ledger = filled(tmp_path, 3)
    with pytest.raises(LedgerError, match="cannot follow entry 2"):
        ledger.append(entry(version))


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 2)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append(entry(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.safetensors", "000001.safetensors"]
    ledger.append(entry(2))
    assert Ledger(tmp_path).version == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_last_entry_is_set_aside_and_the_one_before_is_the_newest(tmp_path, damage, caplog):
    filled(tmp_path, 3)
    path = tmp_path / "000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"cut": data[:-5], "flipped": data, "empty": b""}[damage])
    ledger = Ledger(tmp_path)
    assert ledger.version == 2  # opening to read changes nothing
    assert [found.version for found in ledger.recovered()] == [0, 1]
    assert ledger.version == 1
    assert "set aside as 000002.damaged" in caplog.text
    ledger.append(entry(2))


def test_a_ledger_that_keeps_its_newest_entries_begins_with_the_oldest_of_these(tmp_path):
    ledger = Ledger(tmp_path, keep=2)
    for version in range(4):
        ledger.append(entry(version))
    assert [found.version for found in Ledger(tmp_path).recovered()] == [2, 3]
    (tmp_path / "000002.safetensors").unlink()
    ledger.append(entry(4))
    assert [found.version for found in Ledger(tmp_path).recovered()] == [3, 4]


@pytest.mark.parametrize("ask", [Ledger.read, Ledger.stamp, Ledger.names])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_whatever_is_asked_of_a_damaged_entry_the_answer_names_its_file(tmp_path, ask, damage):
    filled(tmp_path, 2)
    path = tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:9] if damage == "cut" else b"")
    if damage == "gone":
        path.unlink()
    with pytest.raises(LedgerError, match=r"entry 1 (is damaged|is missing|cannot be read): .*000001\.safetensors"):
        ask(Ledger(tmp_path), 1)


def test_a_damaged_earlier_entry_is_refused_by_name(tmp_path):
    filled(tmp_path, 3)
    path = tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerError, match=r"entry 1 is damaged: .*000001\.safetensors"):
        Ledger(tmp_path).read(1)


def test_an_entry_never_changes_once_it_is_there(tmp_path):
    ledger = filled(tmp_path, 2)
    ledger.put(Entry(1, {"B": np.ones(3, np.float32)}))
    assert digest(ledger.read(1).arrays) == digest(entry(1).arrays)


def test_only_the_newest_entries_are_kept_where_asked(tmp_path):
    ledger = Ledger(tmp_path, keep=2)
    for version in range(5):
        ledger.append(entry(version))
    assert ledger.versions() == [3, 4] and ledger.version == 4


def test_digest_depends_on_names_dtypes_shapes_and_values():
    x = np.arange(6, dtype=np.float32)
    variants = [{"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.view(np.int32)}, {"x": x + 1}, {"x": x, "z": x[:0]}]
    assert len({digest(variant) for variant in variants}) == len(variants)
