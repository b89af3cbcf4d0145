"""What `kinodit certify` says of data whose order is not exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kinodit.launch import cli
from tests.support.ranks import ROOT


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_certificate_says_that_it_is_not_of_the_order_of_streams(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_streamed: bool,
) -> None:
    monkeypatch.setattr("kinodit.trainer.certify.run.certify", lambda *_: iter(()))
    document = yaml.safe_load((ROOT / "configs" / "t2v_tiny.yaml").read_text())
    if is_streamed:
        stream = {"shards": ["a.tar.gz"], "num_samples": 9}
        document["data"]["datasets"]["theatre"] = {"path": "web", "stream": stream}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    options = [f"run.out_dir={tmp_path}", "eval.every_steps=0", "--layouts", "dp_shard=2"]
    assert cli.main(["certify", str(tmp_path / "r.yaml"), *options]) == 0
    printed = capsys.readouterr().out
    assert ("not exact: theatre is a stream" in printed) == is_streamed
    end = "The certificate is of the model, not of the order of this data\n"
    assert printed.endswith(end) == is_streamed
