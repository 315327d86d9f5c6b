"""Tables of rows: what of a cell reaches a prompt, and what comes back."""

import csv

import pytest

from gllm_ray.batch.records import Mistake
from gllm_ray.batch.tables import RowTemplate, check_output, read_table, write_table
from gllm_ray.errors import ConfigError

pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")


def row_template(**options):
    said = {"prompt_column": None, "template": None, "id_column": None, **options}
    return RowTemplate(model="m", url="/v1/completions", params={}, **said)


def test_the_cells_of_a_csv_are_taken_and_given_back_as_they_are_spelled(tmp_path):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("id,zip,price,flag\n001,01234,1.10,true\n002,00501,,false\n")
    template = "{{ prompt }} {{ price }} {{ flag }}\n"
    rows = list(
        read_table(source, row_template(prompt_column="zip", template=template, id_column="id"))
    )
    assert [row.custom_id for row in rows] == ["001", "002"]
    assert [row.body["prompt"] for row in rows] == ["01234 1.10 true\n", "00501  false\n"]
    body = {
        "choices": [{"text": "a", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    record = {"response": {"status_code": 200, "body": body}, "error": None}
    answers = {row.custom_id: {"custom_id": row.custom_id, **record} for row in rows}
    write_table(output, source, ".csv", iter(rows), answers.__getitem__)
    with output.open(newline="") as file:
        given_back = [line[:4] for line in csv.reader(file)][1:]
    assert given_back == [["001", "01234", "1.10", "true"], ["002", "00501", "", "false"]]


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("{{ missing }}", [1, 2]),
        ("{{ 6 // n }}", [1]),
        ("{{ n + 'a' }}", [1, 2]),
        ("{{ 'abc'[n:].index('c') }}", [2]),
        ("{{ [7].pop(n) }}", [2]),
    ],
)
def test_a_row_whose_values_the_template_cannot_take_is_a_mistake(tmp_path, template, wrong):
    parquet.write_table(pa.table({"n": [0, 9]}), tmp_path / "in.parquet")
    rows = read_table(tmp_path / "in.parquet", row_template(template=template))
    mistakes = [row for row in rows if isinstance(row, Mistake)]
    assert [mistake.number for mistake in mistakes] == wrong
    assert all(mistake.message.startswith("--template: ") for mistake in mistakes)


@pytest.mark.parametrize(
    ("columns", "options", "mistake"),
    [
        (["text"], {"prompt_column": "txt"}, "--prompt-column=txt: .* has the columns text$"),
        (["text"], {"id_column": "id"}, "--id-column=id: .* has the columns text$"),
        (["text", "finish_reason"], {}, "has a column finish_reason, .* rename it$"),
        (["text", "custom_id"], {"id_column": "text"}, "has a column custom_id, .* rename it$"),
        (["text", "custom_id"], {"id_column": "custom_id"}, None),
    ],
)
def test_columns_that_are_missing_or_are_the_outputs_are_told(tmp_path, columns, options, mistake):
    source = tmp_path / "in.csv"
    source.write_text(",".join(columns) + "\n" + ",".join("ab"[: len(columns)]) + "\n")
    template = row_template(**{"prompt_column": "text", **options})
    if mistake is None:
        assert [row.custom_id for row in read_table(source, template)] == ["b"]
        return
    with pytest.raises(ConfigError, match=mistake):
        list(read_table(source, template))


def test_a_table_that_csv_has_no_place_for_is_refused_before_any_row_is_run(tmp_path):
    source = tmp_path / "in.parquet"
    kinds = [pa.dictionary(pa.int8(), pa.string()), pa.binary(), pa.timestamp("us"), pa.null()]
    flat = {f"flat {kind}": pa.array([None], kind) for kind in kinds}
    parquet.write_table(pa.table(flat), source)
    check_output(source, ".csv")
    parquet.write_table(pa.table({**flat, "list": [[1]], "struct": [{"a": 1}]}), source)
    for suffix in (".parquet", ".jsonl"):
        check_output(source, suffix)
    with pytest.raises(ConfigError, match=r"^--output: must be .* no place for list, struct of "):
        check_output(source, ".csv")
