"""Writes the Parquet goldens with `pyarrow` and `datasets` (made with 26.0.1 and 5.2.0).

    python make_parquet.py

Each file has the same rows in another encoding; `rows.json` holds the columns of text.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent / "parquet"

WORDS = "it is a truth universally acknowledged that a single man must be in want of a wife".split()


def rows():
    """Forty rows: strings with repetitions, nulls, empty strings and lists, every kind of list."""
    for i in range(40):
        text = None if i % 7 == 3 else " ".join(WORDS[i % 5 : i % 5 + i % 11])
        turns = [
            {"role": ["user", "assistant"][t % 2], "content": None if t == 5 else f"{WORDS[(i + t) % 17]} é {i}"}
            for t in range(i % 6)
        ]
        yield {
            "id": i,
            "text": text,
            "score": i / 8,
            "messages": None if i % 9 == 4 else turns,
            "tags": WORDS[: i % 4],
            "needed": f"row {i}",
        }


SCHEMA = pa.schema([
    ("id", pa.int64()),
    ("text", pa.string()),
    ("score", pa.float64()),
    ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("tags", pa.list_(pa.string())),
    pa.field("needed", pa.string(), nullable=False),
])

# No dictionary: the strings are stored in this encoding.
def encoded(encoding):
    leaves = ["text", "messages.list.element.role", "messages.list.element.content",
              "tags.list.element", "needed"]
    return {"use_dictionary": False, "column_encoding": {leaf: encoding for leaf in leaves}}


FILES = {
    "plain": {"compression": "none", "use_dictionary": False, "row_group_size": 16},
    "dictionary-snappy": {"compression": "snappy", "row_group_size": 16},
    "version2-zstd": {"compression": "zstd", "data_page_version": "2.0", "data_page_size": 64, "write_batch_size": 3},
    "delta-gzip": {"compression": "gzip", **encoded("DELTA_BYTE_ARRAY")},
    "lengths-version2": {"compression": "none", "data_page_version": "2.0", **encoded("DELTA_LENGTH_BYTE_ARRAY")},
    "small-pages": {"compression": "snappy", "data_page_size": 32, "write_batch_size": 1, "dictionary_pagesize_limit": 64},
}


def main():
    HERE.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(list(rows()), SCHEMA)
    for name, options in FILES.items():
        pq.write_table(table, HERE / f"{name}.parquet", **options)
    names = ["text", "messages", "tags", "needed"]
    kept = [{name: row[name] for name in names} for row in table.to_pylist()]
    (HERE / "rows.json").write_text(json.dumps(kept, ensure_ascii=False, indent=0) + "\n")
    pq.write_table(table, HERE / "lz4.parquet", compression="lz4")

    # As the data sets of the hub are written.
    from datasets import Dataset

    chat = [{"messages": [{"content": f"question {i}", "role": "user"}, {"content": f"answer {i}", "role": "assistant"}]} for i in range(20)]
    Dataset.from_list(chat).to_parquet(HERE / "datasets.parquet")

    # Lists in lists, which are not read.
    call = {"function": {"name": "walk", "arguments": "{}"}}
    calls = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}]
    pq.write_table(pa.Table.from_pylist(calls), HERE / "tools.parquet")


if __name__ == "__main__":
    main()
