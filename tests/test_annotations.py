"""Shapes and types in signatures are checked while every encoding goes through the tiny layer of the suite, forward and backward.

In a process of its own: jaxtyping's import hook with beartype refuses bad input before posjax's own errors can name it, which
other tests are about.
"""

import subprocess
import sys

import pytest

CHECK = """
import os, sys
sys.path[:0] = [os.path.join(os.getcwd(), "tests"), os.getcwd()]
from jaxtyping import install_import_hook
install_import_hook("posjax", "beartype.beartype")
import jax, jax.numpy as jnp, numpy as np
import pytest
import posjax as pj
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.models.losses import cross_entropy
from flax import nnx

with pytest.raises(Exception, match="encoding"):
    pj.attention(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 2, 4)), encoding=3)  # the hook is at work

tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 12)), jnp.int32)
specs = ["identity", "sinusoidal", "learned", "rope", "rope(fraction=0.5, pairing='interleaved')", "alibi", "t5", "tupe",
         "tupe(relative=True, released=True)", "cope(8)", "cope(8, gates='keys', per_head=True, shared=False)",
         "cope_alibi(learned=True)", "cope_mlp", "rope + cope(8, gates='values')", "cope(8) / identity",
         "alibi(0.5) + cope(8, gate_bias=-1.0, clamp=3)"]
from posjax.encodings.spec import parse_encoding
for spec in specs:
    config = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=12)
    with_params, params = functional(Transformer(config, parse_encoding(spec), rngs=nnx.Rngs(0)))
    loss = lambda p: cross_entropy(with_params(p)(tokens), tokens, jnp.ones(tokens.shape))[1]
    value, gradient = jax.eval_shape(jax.value_and_grad(loss), params)  # what is checked is checked while tracing
    assert value.shape == () and jax.tree.structure(gradient) == jax.tree.structure(params), spec
q = jnp.ones((2, 12, 4, 8))
pj.linear_attention(q, q, q, pj.rope(), is_causal=True)
pj.attention_weights(q, q, pj.alibi(), is_causal=True)
swept = lambda x: pj.chain(pj.sinusoidal(x), pj.rope(x), pj.alibi(x), pj.cope_alibi(x, gate_bias=x), pj.cope_mlp(gate_bias=x))
at = pj.Tokens.at(jnp.arange(12))
jax.eval_shape(lambda x: swept(x).attend(swept(x).init(jax.random.key(0), pj.Dims(4, 8)), pj.AttentionInputs(
    q, q, q, at, at, 1.0)), 2.0)
jax.eval_shape(lambda x: pj.attention(q, q, q, pj.chain(pj.rope(x), pj.alibi(x)), is_causal=True), 2.0)
print("checked", len(specs))
"""


@pytest.mark.thorough
def test_annotations_hold_where_they_are_checked():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "checked 16"
