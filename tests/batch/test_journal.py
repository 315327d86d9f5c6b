import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.batch.journal import Journal
from gllm_ray.batch.records import Answer, encode_record, make_record
from gllm_ray.errors import ConfigError


def record_of(custom_id, *, status=200):
    return make_record(custom_id, Answer(status=status, body={"choices": ["é\ud800\n"]}))


@given(data=st.data())
def test_a_file_cut_at_any_byte_keeps_every_whole_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "part"
    records = [record_of(f"é{i}") for i in range(3)]
    lines = [encode_record(record) for record in records]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    num_whole = sum(cut >= len(b"".join(lines[: i + 1])) for i in range(3))
    journal = Journal(path)
    assert journal.num_done == num_whole
    journal.append(records[num_whole:])
    journal.close()
    assert path.read_bytes() == whole
    journal = Journal(path)
    assert [journal.read(record["custom_id"]) for record in records] == records
    journal.close()


def test_the_last_record_of_a_row_counts(tmp_path):
    journal = Journal(tmp_path / "part")
    journal.append([record_of("a", status=503), record_of("b", status=500)])
    assert journal.is_done("a")
    assert not journal.is_done("a", with_success=True)
    journal.append([record_of("a")])
    journal.close()
    journal = Journal(tmp_path / "part")
    assert journal.is_done("a", with_success=True)
    assert (journal.num_done, journal.num_failed) == (2, 1)
    journal.close()


def test_a_journal_with_damage_before_its_end_is_refused(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(b"no record\n" + encode_record(record_of("a")))
    with pytest.raises(ConfigError, match="byte 0 begins a line that is no record"):
        Journal(path)
