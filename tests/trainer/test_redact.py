"""Secret names and values never pass; names that only look like it stay readable."""

from __future__ import annotations

import pytest

from kinodit.trainer.redact import MASK, is_secret_name, redact, redact_text, secret_values


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "api_key",
        "WANDB_API_KEY",
        "apiKey",
        "HF_TOKEN",
        "hubToken",
        "access-token",
        "token",
        "secret",
        "client_secret",
        "SECRET_KEY_BASE",
        "db_password",
        "passwd",
        "aws_secret_access_key",
        "api_key_prod",
        "credentials",
    ],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "token_budget",
        "max_tokens",
        "tokens",
        "num_key_heads",
        "key_dim",
        "keys",
        "tokenizer",
        "monkey",
        "keyframe",
        "pad_token_id",
        "condition_dropout",
        "tokens_per_s",
    ],
)
def test_names_that_are_not_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_redact_is_deep_and_leaves_the_original_alone() -> None:
    config = {
        "log": {"wandb_api_key": "canary-1", "project": "clips"},
        "data": [{"token": "canary-2", "token_budget": 256}],
        "secrets": {"a": {"b": "canary-3"}, "c": ["canary-4"]},
        "hub_token": None,
        "password": 12345678,
        "url": "https://me:canary-5@host/path?x=1",
        "drop_key": 0.1,
    }
    cleaned = redact(config)
    assert "canary" not in str(cleaned)
    assert cleaned["log"] == {"wandb_api_key": MASK, "project": "clips"}
    assert cleaned["data"] == [{"token": MASK, "token_budget": 256}]
    assert cleaned["hub_token"] is None
    assert cleaned["password"] == MASK
    assert cleaned["url"] == f"https://{MASK}@host/path?x=1"
    assert cleaned["drop_key"] == 0.1
    assert config["secrets"]["a"]["b"] == "canary-3"  # type: ignore[index, call-overload]


def test_a_caption_is_not_mistaken_for_a_credential() -> None:
    prompt = "a red kangaroo: key: soft light, token: 3"
    assert redact({"prompt": prompt})["prompt"] == prompt


@pytest.mark.parametrize(
    "text",
    [
        "wandb: 401, api_key=canary-123",
        'headers {"Authorization": "Bearer canary-123"}',
        "Authorization: Bearer canary-123",
        "could not reach s3://user:canary-123@bucket/shard",
        "url?x=1&token=canary-123&y=2",
    ],
)
def test_text(text: str) -> None:
    assert "canary" not in redact_text(text)


def test_known_values_of_the_environment() -> None:
    environment = {"WANDB_API_KEY": "canary-long-value", "HF_TOKEN": "short", "PATH": "/usr/bin"}
    known = secret_values(environment)
    assert known == ("canary-long-value",)
    assert redact_text("denied for canary-long-value", known) == f"denied for {MASK}"
