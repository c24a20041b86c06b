"""Every kind of model that transformers has: equal to its own eager attention, or refused.

By default a sample; ``-m slow`` runs all of them, for most of an hour.
"""

from __future__ import annotations

import logging

import pytest
import torch
import transformers_models

SAMPLE = (
    "bert",
    "bloom",
    "bridgetower",
    "deepseek_v32",
    "doge",
    "falcon",
    "gemma3_text",
    "git",
    "gpt_neo",
    "gpt_oss",
    "llama",
    "minimax_m3_vl_text",
    "mpt",
    "splinter",
    "t5",
    "whisper",
)
NO_CALLS = ("bloom", "falcon", "git", "gpt_neo", "mpt")  # compute attention themselves


def all_model_types() -> list[str]:
    """Names of all configurations, if transformers is there."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return []
    return [name for name in CONFIG_MAPPING_NAMES if name not in SAMPLE]


@pytest.fixture(scope="module")
def calls():
    """Registers the package; counts calls of its attention function."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from flash_attn import integrations
    from flash_attn.integrations.huggingface import attention_forward

    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0])
        return attention_forward(*args, **kwargs)

    integrations.register("counted")
    transformers.AttentionInterface.register("counted", counted)
    return calls


@pytest.fixture(autouse=True)
def quiet(restore_threads, calls):
    """transformers comments on every unusual configuration."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    calls.clear()
    yield
    logging.disable(logging.NOTSET)


def assert_equal_or_refused(model_type: str) -> transformers_models.Outcome:
    outcome = transformers_models.compare(model_type, "counted")
    assert not outcome.faults, outcome
    return outcome


@pytest.mark.parametrize("model_type", SAMPLE)
@pytest.mark.filterwarnings("ignore:.*attention interface:UserWarning")
def test_model(model_type, calls):
    outcome = assert_equal_or_refused(model_type)
    assert not outcome.refusals
    assert {"no mask", "left padding", "right padding", "holes"} <= set(outcome.checks)
    assert outcome.sensitivity > 100 * transformers_models.TOLERANCE
    assert bool(calls) == (model_type not in NO_CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_model_types())
@pytest.mark.filterwarnings("ignore:.*attention interface:UserWarning")
def test_every_model(model_type):
    try:
        outcome = assert_equal_or_refused(model_type)
    except transformers_models.NotRun as reason:
        pytest.skip(str(reason))
    if outcome.refusals:
        pytest.skip("refused: " + "; ".join(outcome.refusals))
