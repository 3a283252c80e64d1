"""The command line's flags, frozen: a new one is a reviewed change to this list, and there are fewer than 60."""

from streamserve.flags import settings

FLAGS = [
    "--admin-api-key",
    "--api-key",
    "--batch-folder",
    "--chat-template",
    "--chunked-prefill-size",
    "--context-length",
    "--cors-origins",
    "--deterministic",
    "--device",
    "--disable-cuda-graph",
    "--disable-playground",
    "--disable-radix-cache",
    "--drain-timeout-s",
    "--dtype",
    "--embedding-model",
    "--fake",
    "--fake-step-ms",
    "--host",
    "--keep-alive-s",
    "--load-format",
    "--log-format",
    "--log-level",
    "--log-requests",
    "--max-body-mb",
    "--max-decode-pause-ms",
    "--max-queued-requests",
    "--max-running-requests",
    "--max-total-tokens",
    "--media-hosts",
    "--mem-fraction-static",
    "--model-path",
    "--op",
    "--page-size",
    "--port",
    "--random-seed",
    "--reasoning-parser",
    "--request-timeout-s",
    "--response-store",
    "--resume-window-s",
    "--revision",
    "--sampling-defaults",
    "--schedule-policy",
    "--send-interval-ms",
    "--served-model-name",
    "--speculative",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--threads",
    "--tokenizer-path",
    "--tool-call-parser",
    "--vision-model",
    "--write-timeout-s",
]


def test_the_settings_flags_are_these() -> None:
    assert sorted(setting.flag for setting in settings()) == FLAGS


def test_there_are_fewer_than_sixty_settings() -> None:
    """Beside them a command has what names its input and output, and `bench` what it measures."""
    assert len(FLAGS) < 60


def test_every_setting_explains_itself() -> None:
    assert [setting.flag for setting in settings() if not setting.field.metadata.get("help", "").strip()] == []


def test_the_help_shows_about_fifteen_flags() -> None:
    assert 8 <= len([setting for setting in settings() if setting.is_common]) <= 18
