"""Log messages of a rank on the screen and in its file."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mega.observe.log import NOISY_LIBRARIES, configure_logging, quiet_libraries


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in NOISY_LIBRARIES)]
    saved = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in saved:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def log_messages(name: str = "grpo_mega.test") -> None:
    logger = logging.getLogger(name)
    logger.debug("a detail")
    logger.info("a fact")
    logger.warning("a warning")


def test_rank_0_shows_information_and_other_ranks_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    log_messages()
    configure_logging(5, "dp 1/2 pp 0/2 tp 1/2")
    log_messages()
    assert capsys.readouterr().err.splitlines() == [
        "[rank 0] a fact",
        "[rank 0] WARNING a warning",
        "[rank 5 | dp 1/2 pp 0/2 tp 1/2] WARNING a warning",
    ]


def test_the_file_of_a_rank_has_all_levels_and_is_appended_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for _ in range(2):
        configure_logging(5, "tp 1/2", tmp_path / "logs")
        log_messages()
    lines = (tmp_path / "logs" / "rank_00005.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "[rank 5 | tp 1/2] INFO grpo_mega.test: a fact",
        "[rank 5 | tp 1/2] WARNING grpo_mega.test: a warning",
    ] * 2
    assert capsys.readouterr().err.count("a warning") == 2


@pytest.mark.parametrize("name", ["vllm.engine", "megatron.core", "transformers"])
def test_libraries_are_limited_to_warnings_and_use_our_format(capsys: pytest.CaptureFixture[str], name: str) -> None:
    configure_logging(0)
    own = logging.StreamHandler(io.StringIO())
    library = logging.getLogger(name.split(".")[0])
    library.addHandler(own)  # as vLLM and transformers do when they are imported
    library.setLevel(logging.INFO)
    library.propagate = False
    quiet_libraries()
    log_messages(name)
    assert capsys.readouterr().err == "[rank 0] WARNING a warning\n"
    assert own.stream.getvalue() == ""


def test_python_warnings_are_written_to_the_file_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    configure_logging(0, log_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old api", FutureWarning, stacklevel=1)
    assert "old api" in (tmp_path / "rank_00000.log").read_text()
    assert capsys.readouterr().err == ""


def test_a_traceback_reaches_screen_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    configure_logging(3, log_dir=tmp_path)
    try:
        raise RuntimeError("the reason")
    except RuntimeError:
        logging.getLogger("grpo_mega").exception("a phase failed")
    for text in (capsys.readouterr().err, (tmp_path / "rank_00003.log").read_text()):
        assert "[rank 3] ERROR" in text
        assert "a phase failed" in text
        assert "RuntimeError: the reason" in text


def test_a_warning_that_repeats_is_shown_once_then_with_its_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configure_logging(0, log_dir=tmp_path)
    for _ in range(12):
        logging.getLogger("grpo_mega.a").warning("disk is slow")
    logging.getLogger("grpo_mega.a").warning("another one")
    for _ in range(2):
        logging.getLogger("grpo_mega.a").error("an error")
    assert capsys.readouterr().err.splitlines() == [
        "[rank 0] WARNING disk is slow",
        "[rank 0] WARNING disk is slow (10 times)",
        "[rank 0] WARNING another one",
        "[rank 0] ERROR an error",
        "[rank 0] ERROR an error",
    ]
    for handler in logging.getLogger().handlers:
        handler.close()  # as logging.shutdown does at the end of a rank
    assert capsys.readouterr().err == "[rank 0] WARNING disk is slow (12 times)\n"
    assert (tmp_path / "rank_00000.log").read_text().count("disk is slow") == 12


def test_control_characters_reach_neither_terminal_nor_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    configure_logging(0, log_dir=tmp_path)
    logging.getLogger("grpo_mega.a").info("first\nsecond \x1b[31m \x07")
    shown = capsys.readouterr().err
    assert shown == "[rank 0] first\nsecond \\x1b[31m \\x07\n"
    assert "second \\x1b[31m \\x07" in (tmp_path / "rank_00000.log").read_text()
