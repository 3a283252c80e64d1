"""Keyword arguments of an engine: whose names are understood, and what is said of those that are wrong."""

import logging
from typing import Any

import pytest
import structlog

from streamserve import Engine
from streamserve.errors import ConfigError
from streamserve.llm.settings import config_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle_path": "x"}, r"^unknown setting modle_path; did you mean model_path\?$"),
        ({"port": 30000}, "^port is for a server"),
        ({"tp_size": 2}, "^tp_size 2 cannot be served: one server uses one GPU"),
        ({"max_total_tokens": "lots"}, "max_total_tokens: 'lots' is not a whole number"),
        ({"max_total_tokens": 64, "mem_fraction_static": 0.5}, "^mem_fraction_static and max_total_tokens both fix"),
        ({"is_embedding": True}, "embedding_model"),
        ({"context_length": 64, "max_model_len": 32}, "^context_length and max_model_len are the same setting; give one"),
        ({"disable_radix_cache": "yes"}, "^disable_radix_cache is 'yes'; allowed is True or False"),
        ({"context_length": True}, "^context_length is True; allowed is a number"),
        ({"max_model_len": "lots"}, "^context_length: 'lots' is not a whole number"),
        ({"speculative_algorithm": "EAGLE"}, "is given without speculative_draft_model_path,"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_written(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(fake=True, **settings)


def test_settings_in_everybodys_words() -> None:
    config = config_of(
        {
            "model_path": None,
            "max_model_len": "8k",
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            "op": ["a=b", "c=d"],
            "media_hosts": "example.org",
            "dtype": "half",
            "tp_size": 1,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
            "swap_space": 4,
        }
    )
    assert config.scheduler.speculative == '{"method": "ngram", "num_speculative_tokens": 3}' and config.server.max_body_mb > 500
    assert (config.model.context_length, config.cache.mem_fraction_static) == (8192, 0.5)
    assert config.cache.disable_radix_cache and config.device.op == ("a=b", "c=d")
    assert (config.server.media_hosts, config.model.dtype) == (("example.org",), "float16")


def test_a_batch_waits_at_the_engines_door_and_not_outside() -> None:
    for settings, expected in (({}, 256), ({"max_running_requests": 512}, 1024), ({"max_queued_requests": 3}, 3)):
        with Engine(fake=True, fake_step_ms=0, **settings) as engine:
            assert engine._host.max_in_flight == expected
            assert len(engine.generate(["a"] * 20, {"max_new_tokens": 1})) == 20


def test_a_setting_without_effect_is_told_of_by_the_logger(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = structlog.get_config()
    structlog.reset_defaults()  # as it is in a process that has no engine yet
    try:
        with caplog.at_level(logging.WARNING, "streamserve"), Engine(fake=True, trust_remote_code=True, swap_space=4):
            pass
    finally:
        structlog.configure(**before)
    assert "trust_remote_code means nothing here" in caplog.text and "swap_space means nothing here" in caplog.text
    assert capsys.readouterr().out == ""
