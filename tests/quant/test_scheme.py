"""Schemes: what they say of every module, how they are written down, and what is refused with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoints import BASE
from hypothesis import given
from hypothesis import strategies as st

from quant.llama import LlamaConfig
from quant.scheme import LINEAR_SITES, SCHEMES, LinearScheme, Scheme, SchemeError, named, read_scheme

MODULES = {site: f"model.layers.3.{suffix}" for site, suffix in LINEAR_SITES.items()}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("w4a4", LinearScheme(4, "tensor", 4, "tensor")),
        ("w4a4-token", LinearScheme(4, "channel", 4, "token")),
        ("w4a8", LinearScheme(4, "tensor", 8, "tensor")),
        ("w4a16", LinearScheme(4, "tensor", 16, "tensor")),
    ],
)
def test_named_schemes_treat_the_body_alike_and_the_rest_not_at_all(name, body):
    scheme = named(name)
    assert {module: scheme.linear(module) for module in MODULES.values()} == dict.fromkeys(MODULES.values(), body)
    assert scheme.linear("lm_head") == LinearScheme()
    assert (scheme.embedding_bits, scheme.kv_bits, scheme.hadamard) == (16, 16, "none")
    assert scheme.label == name
    assert body.static is (name in ("w4a4", "w4a8"))


@pytest.mark.parametrize("name", ["w2a2", "", "W4A4", None, 4, [], {}, ["w4a4"], "x" * 9999])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(SchemeError, match=r"unknown scheme .*; known: w4a4, w4a4-token, w4a8, w4a16$") as caught:
        named(name)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.norm", "q_proj", "", "model.layers.0.mlp"])
def test_what_is_no_linear_layer_has_no_scheme(module):
    with pytest.raises(KeyError):
        named("w4a4").linear(module)


def test_every_site_can_be_changed_by_itself():
    for site, module in MODULES.items():
        changed = named("w4a4").changed(**{site: {"weight_granularity": "channel"}})
        assert changed.linear(module) == LinearScheme(4, "channel", 4, "tensor")
        others = [other for other in MODULES.values() if other != module]
        assert all(changed.linear(other) == named("w4a4").linear(other) for other in others)


def test_what_is_no_longer_quantized_loses_its_granularity():
    changed = named("w4a4-token").changed(down={"weight_bits": 16, "activation_bits": 16})
    assert changed.down == LinearScheme()
    by_token = named("w4a4-token").changed(o={"activation_bits": 16})
    assert by_token.o == LinearScheme(4, "channel", 16, "tensor")


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"kv_bits": 4}, "w4a4-kv4"),
        ({"head": 8, "embedding_bits": 8}, "w4a4-head8-embedding8"),
        ({"kv_bits": 8, "head": 4, "embedding_bits": 4}, "w4a4-kv8-head4-embedding4"),
        ({"down": {"activation_bits": 8}}, "w4a4+"),
        ({"kv_bits": 4, "down": {"weight_bits": 16, "activation_bits": 16}}, "w4a4-kv4+"),
        ({"hadamard": "ffn"}, "w4a4"),
    ],
)
def test_labels_tell_variants_apart(changes, label):
    assert named("w4a4").changed(**changes).label == label


def test_a_number_for_the_head_means_rows_of_codes_and_inputs_of_8_bits():
    assert named("w4a4").changed(head=4).head == LinearScheme(4, "channel", 8, "token")
    assert named("w4a4").changed(head=8).head == LinearScheme(8, "channel", 8, "token")
    assert named("w4a4").changed(head=8).changed(head=16).head == LinearScheme()
    assert named("w4a4").changed(head={"weight_bits": 4}).head == LinearScheme(4, "channel", 8, "token")


REFUSED = [
    ({"weights": 4}, "unknown setting 'weights'; known: down, embedding_bits, gate, hadamard, head, k, kv_bits"),
    ({"name": "w4a4"}, "unknown setting 'name'"),
    ({"group_size": 128}, "group_size: one scale a tensor or an output channel is what there is"),
    ({"q": {"group_size": 128}}, "q.group_size: one scale a tensor or an output channel"),
    ({"q": {"bits": 4}}, "q: unknown setting 'bits'; known: weight_bits, weight_granularity, activation_bits"),
    ({"q": 8}, "q: settings by name are wanted, not 8"),
    ({"q": None}, "q: settings by name are wanted, not None"),
    ({"head": "8"}, "head: settings by name are wanted, not '8'"),
    ({"head": 5}, "head is 5; it must be one of 4, 8, 16"),
    ({"head": True}, "head is True; it must be one of 4, 8, 16"),
    ({"kv_bits": 2}, "kv_bits is 2; it must be one of 4, 8, 16"),
    ({"kv_bits": "4"}, "kv_bits is '4'; it must be one of 4, 8, 16"),
    ({"kv_bits": None}, "kv_bits is None; it must be one of 4, 8, 16"),
    ({"kv_bits": 4.0}, "kv_bits is 4.0; it must be one of 4, 8, 16"),
    ({"embedding_bits": True}, "embedding_bits is True; it must be one of 4, 8, 16"),
    ({"embedding_bits": [8]}, "embedding_bits is [8]; it must be one of 4, 8, 16"),
    ({"hadamard": "heads"}, "hadamard is 'heads'; it must be one of none, ffn, full"),
    ({"hadamard": True}, "hadamard is True"),
    ({"down": {"weight_bits": 3}}, "down.weight_bits is 3; it must be one of 4, 8, 16"),
    ({"down": {"weight_bits": 4.5}}, "down.weight_bits is 4.5; it must be one of 4, 8, 16"),
    ({"down": {"activation_bits": 32}}, "down.activation_bits is 32"),
    (
        {"down": {"weight_granularity": "group"}},
        "down.weight_granularity is 'group'; it must be one of tensor, channel",
    ),
    ({"down": {"activation_granularity": "channel"}}, "down.activation_granularity is 'channel'; it must be one of"),
    ({"down": {"weight_bits": 8}}, "down: activations of 4 bits with weights of 8 bits"),
    ({"down": {"weight_bits": 16}}, "down: activations of 4 bits with weights of 16 bits"),
    (
        {"down": {"activation_bits": 16, "activation_granularity": "token"}},
        "down: activation_granularity 'token' says nothing where activation_bits is 16",
    ),
    (
        {"down": {"weight_bits": 16, "activation_bits": 16, "weight_granularity": "channel"}},
        "down: weight_granularity 'channel' says nothing where weight_bits is 16",
    ),
    ({"q": {"activation_bits": 8}}, "q, k, v: they read one tensor"),
    ({"up": {"activation_granularity": "token"}}, "gate, up: they read one tensor"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_makes_no_sense_is_refused_with_the_reason(changes, message):
    with pytest.raises(SchemeError) as caught:
        named("w4a4").changed(**changes)
    assert str(caught.value).startswith(message)


def test_sites_that_share_an_input_may_leave_it_as_it_is():
    changed = named("w4a4").changed(v={"weight_bits": 16, "activation_bits": 16})
    assert changed.v == LinearScheme()
    together = {site: {"activation_bits": 8} for site in "qkv"}
    assert named("w4a4").changed(**together).k.activation_bits == 8


def test_a_scheme_that_quantizes_nothing_is_refused():
    nothing = {site: {"weight_bits": 16, "activation_bits": 16} for site in LINEAR_SITES}
    with pytest.raises(SchemeError, match="nothing is quantized: every site has 16 bits"):
        named("w4a4").changed(**nothing)
    assert named("w4a4").changed(**nothing, kv_bits=8).label == "w4a4-kv8+"


# ---- written down ----

BITS = st.sampled_from([4, 8, 16])
CHANGES = st.fixed_dictionaries(
    {"kv_bits": BITS, "embedding_bits": BITS, "head": BITS, "hadamard": st.sampled_from(["none", "ffn", "full"])},
    optional={
        "down": st.fixed_dictionaries({"weight_bits": BITS, "activation_bits": st.just(16)}),
        "o": st.fixed_dictionaries({"weight_granularity": st.sampled_from(["tensor", "channel"])}),
    },
)


@given(st.sampled_from(list(SCHEMES)), CHANGES)
def test_a_scheme_survives_json(name, changes):
    scheme = named(name).changed(**changes)
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def spoiled(**changes):
    return named("w4a4").to_dict() | changes


LINEAR = {"weight_bits": 4, "weight_granularity": "tensor", "activation_bits": 4, "activation_granularity": "tensor"}
HOSTILE = [
    ({}, "not a quantization scheme: down, embedding_bits, gate"),
    (spoiled(more=1), "not a quantization scheme"),
    (spoiled(q=None), "q: settings by name are wanted, not None"),
    (spoiled(q=[4, 4]), "q: settings by name are wanted, not [4, 4]"),
    (spoiled(q={}), "q: activation_bits, activation_granularity, weight_bits, weight_granularity missing"),
    (spoiled(q=LINEAR | {"group_size": 4}), "q.group_size: one scale"),
    (spoiled(q=LINEAR | {"weight_bits": [4]}), "q.weight_bits is [4]"),
    (spoiled(q=LINEAR | {"weight_bits": 10**400}), "q.weight_bits is 1000000"),
    (spoiled(head=LINEAR | {"weight_granularity": {}}), "head.weight_granularity is {}"),
    (spoiled(head=8), "head: settings by name are wanted, not 8"),
    (spoiled(kv_bits={"a": 1}), "kv_bits is {'a': 1}"),
    (spoiled(kv_bits=float("nan")), "kv_bits is nan"),
    (spoiled(hadamard=None), "hadamard is None"),
    (spoiled(q=LINEAR | {"activation_bits": 8}), "q, k, v: they read one tensor"),
    (spoiled(name=None), "unknown scheme None"),
    (spoiled(name={"a": 1}), "unknown scheme {'a': 1}"),
    (spoiled(name=["w4a4"]), "unknown scheme ['w4a4']"),
    (spoiled(name="w9"), "unknown scheme 'w9'"),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_what_is_no_scheme_is_refused_when_read(content, message):
    with pytest.raises(SchemeError) as caught:
        Scheme.from_dict(content)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


def test_a_scheme_is_read_from_yaml(tmp_path):
    file = tmp_path / "scheme.yaml"
    file.write_text(
        "scheme: w4a4\nkv_bits: 4\nhadamard: ffn\n"
        "down: {activation_bits: 8}\nhead: {weight_bits: 8}\nembedding_bits: 8\n"
    )
    wanted = named("w4a4").changed(
        kv_bits=4, hadamard="ffn", down={"activation_bits": 8}, head={"weight_bits": 8}, embedding_bits=8
    )
    assert read_scheme(file) == wanted
    file.write_text("head: 8\n")
    assert read_scheme(str(file)) == named("w4a4").changed(head=8)
    file.write_text("{}")
    assert read_scheme(file) == named("w4a4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a scheme file: settings by name are wanted, not None"),
        ("- w4a4", "a scheme file: settings by name are wanted, not ['w4a4']"),
        ("w4a4", "a scheme file: settings by name are wanted, not 'w4a4'"),
        ("scheme: [", "cannot be read"),
        ("scheme: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("scheme: w9", "unknown scheme 'w9'"),
        ("scheme: 4", "unknown scheme 4"),
        ("kv: 4", "unknown setting 'kv'"),
        ("1: 4", "unknown setting '1'"),
        ("group_size: 128", "group_size: one scale"),
        ("down: {activation_bits: 5}", "down.activation_bits is 5"),
        ("\x00", "cannot be read"),
        ("[" * 900, "cannot be read"),
    ],
)
def test_a_spoiled_file_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "scheme.yaml"
    file.write_text(content)
    with pytest.raises(SchemeError) as caught:
        read_scheme(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for file in (tmp_path / "nothing.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(SchemeError, match="cannot be read"):
            read_scheme(file)


# ---- for a model ----


def config(**overrides):
    return LlamaConfig.from_json("m", {**BASE, **overrides})


TIED = {"tie_word_embeddings": True}
NOT_FOR_THIS_MODEL = [
    ({"hadamard": "ffn"}, {"intermediate_size": 41}, "hadamard 'ffn': the feed-forward width 41 is odd"),
    ({"hadamard": "full"}, {"intermediate_size": 41}, "hadamard 'full': the feed-forward width 41 is odd"),
    ({"hadamard": "full"}, {"hidden_size": 39, "head_dim": 8}, "hadamard 'full': the model's width 39 is odd"),
    ({"head": 8}, TIED, "embedding_bits 16 beside a head of 8 bits: this model's head is tied"),
    ({"embedding_bits": 4}, TIED, "embedding_bits 4 beside a head of 16 bits"),
    (
        {"embedding_bits": 8, "head": {"weight_bits": 8, "weight_granularity": "tensor"}},
        TIED,
        "head: tied to the embedding, which has a scale a row",
    ),
    (
        {"embedding_bits": 8, "head": {"weight_bits": 8, "activation_granularity": "tensor"}},
        TIED,
        "head: a tied head has no static input scale",
    ),
    ({}, {"intermediate_size": 131_072}, "down: an integer sum over 131072 inputs may overflow an int32"),
    ({}, {"num_attention_heads": 8192, "head_dim": 16}, "o: an integer sum over 131072"),
    ({"head": 8}, {"hidden_size": 131_072}, "q: an integer sum over 131072"),
    (
        {**{site: {"activation_bits": 16} for site in LINEAR_SITES}, "head": 8},
        {"hidden_size": 131_072},
        "head: an integer sum over 131072",
    ),
]


@pytest.mark.parametrize(("changes", "shape", "message"), NOT_FOR_THIS_MODEL, ids=[m for *_, m in NOT_FOR_THIS_MODEL])
def test_what_makes_no_sense_for_a_model_is_refused(changes, shape, message):
    with pytest.raises(SchemeError) as caught:
        config(**shape).check_scheme(named("w4a4").changed(**changes))
    assert str(caught.value).startswith(message)


def test_what_makes_sense_for_a_model_is_not_refused():
    config(**TIED).check_scheme(named("w4a4").changed(head=8, embedding_bits=8))
    config(**TIED).check_scheme(named("w4a4").changed(head=8, hadamard="full"))  # which unties it
    config().check_scheme(named("w4a4").changed(head=4, hadamard="ffn"))
    config().check_scheme(replace(named("w4a16"), kv_bits=4))
    config(intermediate_size=131_071).check_scheme(named("w4a8"))  # of which an int32 holds the sum
    config(intermediate_size=131_072, hidden_size=131_072).check_scheme(named("w4a16"))  # which sums no integers
