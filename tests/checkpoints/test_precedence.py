"""Two statements in one folder: what counts, and what is said; what adds nothing; what is no model at all."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.tiny_models import write_tiny
from safetensors.numpy import load_file, save_file

from jquant.checkpoints.model import open_model
from jquant.core import UserError
from jquant.text import _chat
from jquant.text.token_ids import from_metadata

LLAMA = "LlamaForCausalLM"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, **tensors: np.ndarray) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def own_lm_head(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


def equal_lm_head(folder: Path) -> None:
    own_lm_head(folder)
    edit_tensors(
        folder, **{"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]}
    )


def stale_index(folder: Path) -> None:
    shards = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def index_of_the_one_file(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def window(folder: Path) -> None:
    edit(folder / "config.json", architectures=["MistralForCausalLM"], sliding_window=16)


# What is done to the folder, a word of the remark (None: none), and whether there is an output matrix.
@pytest.mark.parametrize(
    ("change", "said", "has_output"),
    [
        (own_lm_head, "tie_word_embeddings", True),
        (equal_lm_head, None, False),
        (stale_index, "model.safetensors", True),
        (index_of_the_one_file, None, True),
        (window, "last 16 tokens", True),
    ],
)
def test_of_two_statements_one_counts_and_it_is_said_which(change, said, has_output, tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    change(folder)
    model = open_model(folder)
    assert ("output.weight" in model.source.specs) == has_output
    assert [said in remark for remark in model.remarks] == ([] if said is None else [True])


ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": ROPE, "rope_parameters": {**ROPE, "factor": 4.0}}, "'factor'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_statements_that_cannot_both_hold_are_refused(config, named, tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    edit(folder / "config.json", **config)
    with pytest.raises(UserError, match=named):
        open_model(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": None},
        {"use_sliding_window": False},
        {"_flash_attn_2_enabled": True},
        {"max_sequence_length": 2048},
        {"rope_scaling": ROPE, "rope_parameters": ROPE},
    ],
)
def test_keys_that_ask_for_nothing_are_accepted(config, tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    edit(folder / "config.json", **config)
    open_model(folder)


def test_a_key_that_may_change_the_function_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    edit(folder / "config.json", sliding_window=64)
    with pytest.raises(UserError, match="sliding_window"):
        open_model(folder)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_of_zeros_adds_nothing_and_another_is_refused(value, tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    edit_tensors(folder, **{"model.layers.0.mlp.up_proj.bias": np.full(96, value, np.float32)})
    if value == 0:
        open_model(folder)
        return
    with pytest.raises(UserError, match=r"up_proj\.bias"):
        open_model(folder)


def test_the_hub_s_other_name_for_a_key_is_read_and_a_contradiction_refused(tmp_path):
    folder = write_tiny(tmp_path / "m", "Qwen3MoeForCausalLM")
    edit(folder / "config.json", num_local_experts=6)
    open_model(folder)
    edit(folder / "config.json", num_local_experts=8)
    with pytest.raises(UserError, match="num_local_experts"):
        open_model(folder)


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": json.dumps({"chat_template": "J"})}, {"": "J"}),
        ({"chat_template.jinja": "A", "chat_template.json": json.dumps({"chat_template": "J"})}, {"": "A"}),
        (
            {"chat_template.jinja": "A", "additional_chat_templates/rag.jinja": "R"},
            {"": "A", ".rag": "R", "s": ["rag"]},
        ),
    ],
)
def test_templates_come_from_all_places_where_a_model_says_them(files, expected, tmp_path):
    folder = write_tiny(tmp_path / "m", LLAMA)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    found = open_model(folder).metadata
    assert {
        key.removeprefix("tokenizer.chat_template"): value
        for key, value in found.items()
        if key.startswith("tokenizer.chat_template")
    } == expected


# What transformers' apply_chat_template renders of these (chat_template_utils.py).
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}", "hé<hé"),
        ("{% for m in messages %}{{ m['content'] }}{% break %}{% endfor %}", "hé<"),
        ("{{ messages[0]['content'] | tojson }}", '"hé<"'),
        ("{{ strftime_now('%%') }}{{ tools is none }}", "%True"),
        ("{{ bos_token }}{{ eos_token }}", "<|begin_of_text|><|end_of_text|>"),
    ],
)
def test_chats_are_rendered_as_transformers_does_it(template, text, tmp_path):
    model = open_model(write_tiny(tmp_path / "m", LLAMA))
    messages = [{"role": "user", "content": "hé<"}, {"role": "assistant", "content": "hé"}]
    tokenizer = from_metadata(model.metadata)
    if "bos_token" in template:
        text = tokenizer.special_texts["bos"] + tokenizer.special_texts["eos"]
        assert text
    assert _chat.render(messages, tokenizer, template, "here") == text


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    tokenizer = from_metadata(open_model(write_tiny(tmp_path / "m", LLAMA)).metadata)
    with pytest.raises(UserError, match="template"):
        _chat.render([], tokenizer, "{{ ''.__class__.__mro__[1].__subclasses__() }}", "here")


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "mmproj"])
def test_a_gguf_file_of_another_kind_is_named_for_what_it_is(kind, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("general.type", kind)
    writer.add_tensor("some.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="no model but"):
        open_model(tmp_path / "x.gguf")


def test_a_folder_with_an_adapter_alone_is_named_for_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": np.zeros((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="LoRA adapter"):
        open_model(tmp_path)


def test_a_snapshot_of_the_hub_has_the_repository_s_name(tmp_path):
    snapshot = tmp_path / "models--org--nice-model" / "snapshots" / ("ab" * 20)
    snapshot.parent.mkdir(parents=True)
    write_tiny(snapshot, LLAMA)
    assert open_model(snapshot).metadata["general.name"] == "nice-model"
