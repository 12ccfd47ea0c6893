# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""Rotations by several coordinates, xPos, PoPE and query scales against transformers and x-transformers, run here and now.

The packages compute phases in float32; positions are small enough for these to be good to 1e-5. Far positions are compared with
closed forms in tests/encodings/test_multi_axis.py.
"""

import math
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
x_transformers = pytest.importorskip("x_transformers.x_transformers")
qwen2_vl = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
qwen3_vl = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
ernie = pytest.importorskip("transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe")
glm4v = pytest.importorskip("transformers.models.glm4v.modeling_glm4v")
dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
pixtral = pytest.importorskip("transformers.models.pixtral.modeling_pixtral")
gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
sam2 = pytest.importorskip("transformers.models.sam2_video.modeling_sam2_video")
ministral3 = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")

from ours import attention, close, normal, rotate, rotate_at

import posjax as pj

B, N, K = 2, 4, 2
CONVERSATION = [3, (1, 8, 12), 5, (6, 4, 4), 4]  # text, an image, text, a video, text


def config(head_dim, theta=10_000.0, rope_type="default", **more):
    rope = {"rope_type": rope_type, "rope_theta": theta} | more
    return types.SimpleNamespace(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=32_768)


def to_torch(*arrays):
    return [torch.from_numpy(np.asarray(x)) for x in arrays]


def agrees(encoding, reference, query, key, at):
    for got, want in zip(rotate_at(encoding, query, key, at), reference, strict=True):
        close(got, want.detach().numpy())


# --- M-RoPE ------------------------------------------------------------------------------------------------------


MODELS = {
    "Qwen2-VL": (qwen2_vl, "Qwen2VLRotaryEmbedding", (16, 24, 24), [16, 24, 24], "blocks", "half"),
    "Qwen3-VL": (qwen3_vl, "Qwen3VLTextRotaryEmbedding", (24, 20, 20), [24, 20, 20], "interleaved", "half"),
    "Qwen3.5's sections": (qwen3_vl, "Qwen3VLTextRotaryEmbedding", (11, 11, 10), [11, 11, 10], "interleaved", "half"),
    "GLM-4V": (glm4v, "Glm4vTextRotaryEmbedding", (8, 12, 12), [8, 12, 12], "blocks", "interleaved"),
    "Ernie 4.5 VL": (ernie, "Ernie4_5_VLMoeTextRotaryEmbedding", (20, 22, 22), [22, 22, 20], "alternating", "interleaved"),
}


@pytest.mark.parametrize("model", MODELS)
def test_mrope_equals_transformers_on_text_with_an_image_and_a_video(model):
    module, cls, sections, theirs, layout, pairing = MODELS[model]
    head_dim = 2 * sum(sections)
    at, _ = pj.mrope_positions(CONVERSATION)
    query, key = normal(1, (B, len(at), N, head_dim), (B, len(at), K, head_dim))
    embedding = getattr(module, cls)(config(head_dim, 1e6, mrope_section=theirs))
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(at.T.astype(np.int64))[:, None])
    want = module.apply_rotary_pos_emb(*to_torch(query, key), cos, sin, unsqueeze_dim=2)
    agrees(pj.mrope(sections, layout, theta=1e6, pairing=pairing), want, query, key, at)


def test_mrope_with_yarn_equals_qwen2_vl():
    """As Qwen2.5-VL's card configures it for long inputs."""
    at, _ = pj.mrope_positions(CONVERSATION)
    query, key = normal(6, (B, len(at), N, 128), (B, len(at), K, 128))
    yarn = dict(factor=4.0, original_max_position_embeddings=32_768, mrope_section=[16, 24, 24])
    how = config(128, 1e6, "yarn", **yarn)
    how.hidden_size, how.num_attention_heads, how.standardize_rope_params = 512, 4, lambda: None
    cos, sin = qwen2_vl.Qwen2VLRotaryEmbedding(how)(torch.zeros(1), torch.from_numpy(at.T.astype(np.int64))[:, None])
    want = qwen2_vl.apply_rotary_pos_emb(*to_torch(query, key), cos, sin, unsqueeze_dim=2)
    read = {"model_type": "qwen2_vl_text", "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 32_768}
    encoding = pj.rope_from_config(read | {"rope_scaling": {"type": "yarn"} | yarn})
    assert encoding == pj.mrope((16, 24, 24), theta=1e6, scaling=pj.yarn_scaling(factor=4.0, original_max_length=32_768))
    agrees(encoding, want, query, key, at)


def rope_index(parts, merge_size=2):
    """transformers' coordinates and offset of a sequence of text and grids."""
    kinds = [[0] * p if isinstance(p, int) else [1 if p[0] == 1 else 2] * (math.prod(p) // merge_size**2) for p in parts]
    kinds = torch.tensor([[kind for part in kinds for kind in part]])
    grids = {n: [p for p in parts if not isinstance(p, int) and (p[0] > 1) == (n == 2)] for n in (1, 2)}
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=merge_size)))
    model.get_vision_position_ids = types.MethodType(qwen2_vl.Qwen2VLModel.get_vision_position_ids, model)
    image, video = (torch.tensor(grids[n]) if grids[n] else None for n in (1, 2))
    at, offset = qwen2_vl.Qwen2VLModel.get_rope_index(model, kinds, kinds, image, video)
    return at[:, 0].T.numpy(), int(offset)


def test_mrope_positions_equal_transformers_except_after_a_long_video():
    """Its rule after a video, start + max(height, width), forgets time; both rules agree where the video has no more frames."""
    for parts in ([4, (1, 8, 12), 5], [(1, 4, 4), 1, (1, 12, 4), 1], [2, (3, 8, 6), 3, (1, 4, 4), 2]):
        at, offset = pj.mrope_positions(parts)
        theirs, their_offset = rope_index(parts)
        np.testing.assert_array_equal(at, theirs)
        assert offset == their_offset
    at, _ = pj.mrope_positions([3, (8, 4, 4), 2])
    theirs, _ = rope_index([3, (8, 4, 4), 2])
    np.testing.assert_array_equal(at[:35], theirs[:35])
    assert at[35].tolist() == [11] * 3 and theirs[35].tolist() == [5] * 3


# --- axial -------------------------------------------------------------------------------------------------------


def vision(head_dim, rows, columns, theta=10_000.0):
    at = pj.axial_coordinates((rows, columns))
    query, key = normal(2, (B, len(at), N, head_dim), (B, len(at), K, head_dim))
    return at, query, key, config(head_dim, theta, "axial")


def test_axial_shared_equals_the_vision_of_qwen2_vl():
    at, query, key, how = vision(40, 6, 9)
    how.hidden_size, how.embed_dim, how.num_heads = 160, 160, 4
    cos, sin = qwen2_vl.Qwen2VLVisionRotaryEmbedding(how)(torch.zeros(1), torch.from_numpy(at.astype(np.int64)))
    agrees(pj.axial_rope(), qwen2_vl.apply_rotary_pos_emb_vision(*to_torch(query, key), cos, sin), query, key, at)


def test_axial_split_equals_pixtral():
    at, query, key, how = vision(40, 6, 9)
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(how)(torch.zeros(1), torch.from_numpy(at))
    want = pixtral.apply_rotary_pos_emb(*to_torch(query, key), cos[None], sin[None], unsqueeze_dim=2)
    agrees(pj.axial_rope(layout="split"), want, query, key, at)


def test_axial_blocks_equals_gemma_4():
    at, query, key, how = vision(40, 6, 9, theta=100.0)
    ids = torch.from_numpy(np.broadcast_to(at, (B, *at.shape)).copy())
    cos, sin = gemma4.Gemma4VisionRotaryEmbedding(how)(torch.zeros(1), ids)
    want = [gemma4.apply_multidimensional_rope(x, cos, sin, ids) for x in to_torch(query, key)]
    agrees(pj.axial_rope(layout="blocks", theta=100.0), want, query, key, at)


def test_axial_interleaved_equals_sam_2_with_x_first():
    at, query, key, _ = vision(32, 7, 5)
    how = types.SimpleNamespace(
        rope_parameters={"rope_type": "axial", "rope_theta": 10_000.0},
        memory_attention_hidden_size=64,
        memory_attention_downsample_rate=1,
        memory_attention_num_attention_heads=2,
    )
    embedding = sam2.Sam2VideoVisionRotaryEmbedding(how)
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(at[:, ::-1].copy()))  # its model passes x, then y
    query_t, key_t = (x.transpose(1, 2) for x in to_torch(query, key))
    want = [sam2.apply_rotary_pos_emb_2d(x, x, cos, sin)[0].transpose(1, 2) for x in (query_t, key_t)]
    agrees(pj.axial_rope(pairing="interleaved", order=(1, 0)), want, query, key, at)


def test_axial_equals_dinov3_with_cls_and_registers():
    how = types.SimpleNamespace(
        rope_theta=100.0, hidden_size=160, num_attention_heads=4, image_size=(48, 80), patch_size=16,
        pos_embed_shift=None, pos_embed_jitter=None, pos_embed_rescale=None,
    )  # fmt: skip
    at = pj.axial_coordinates((3, 5), normalize="separate", num_prefix_tokens=5)
    query, key = normal(3, (B, 20, N, 40), (B, 20, N, 40))
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(how)(torch.zeros(1, 3, 48, 80))
    heads_first = [x.transpose(1, 2) for x in to_torch(query, key)]
    want = [x.transpose(1, 2) for x in dinov3.apply_rotary_pos_emb(*heads_first, cos, sin)]
    agrees(pj.axial_rope(theta=100.0, scale=2 * math.pi, num_prefix_tokens=5), want, query, key, at)


# --- xPos, PoPE, query scales ------------------------------------------------------------------------------------


def test_xpos_products_equal_x_transformers():
    length, head_dim = 40, 16
    query, key = normal(4, (B, length, N, head_dim), (B, length, N, head_dim))
    freqs, scale = x_transformers.RotaryEmbedding(head_dim, use_xpos=True).forward_from_seq_len(length)
    q, k = (
        x_transformers.apply_rotary_pos_emb(torch.from_numpy(x).transpose(1, 2), freqs, of_side)
        for x, of_side in ((query, scale), (key, scale**-1))
    )
    ours = rotate(pj.xpos(), query, key, np.arange(length))
    got = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in ours))
    close(got, torch.einsum("bnth,bnsh->bnts", q.double(), k.double()).numpy(), 2e-5)


def test_pope_attention_equals_x_transformers():
    length, head_dim = 24, 16
    query, key, value = normal(5, *[(B, length, N, head_dim)] * 3)
    delta = np.random.default_rng(0).uniform(-6.0, 0.0, (N, head_dim)).astype(np.float32)
    polar = x_transformers.PolarEmbedding(head_dim, N)
    polar.learned_bias.data = torch.from_numpy(delta)[:, None]
    positions, bias = polar(torch.arange(length))
    q = x_transformers.apply_polar_pos_emb(torch.from_numpy(query).transpose(1, 2), positions)
    k = x_transformers.apply_polar_pos_emb(torch.from_numpy(key).transpose(1, 2), positions + bias)
    scores = (q @ k.transpose(-1, -2)).double() / math.sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    want = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), torch.from_numpy(value).double()).detach().numpy()
    close(attention(query, key, value, pj.pope(), {"delta": jax.numpy.asarray(delta)}, is_causal=True), want)


def test_log_scale_equals_ministral_3():
    at = np.array([0, 5, 15, 16, 17, 31, 32, 1000])
    want = ministral3.get_llama_4_attn_scale(torch.from_numpy(at)[None], 0.1, 16)[0, 0, :, 0].numpy()
    ones = np.ones((1, len(at), 1, 2), np.float32)
    got, _ = rotate(pj.log_scale(16, 0.1, "ministral3"), ones, ones, at)
    close(got[0, :, 0, 0], want, 1e-6)
