"""Vision-language models whose patches lie one image's after the other's, (sum of patches, D)."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from brute_force import norm
from graddot_lm import GraddotError, GradDotProdEngine
from loop_steps import mapping_dots
from model_zoo import shaken
from torch import nn
from transformers.utils import ModelOutput

IMAGE = 60


def qwen_vl():
    torch.manual_seed(0)
    text = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=59
    )
    return shaken(transformers.Qwen2VLForConditionalGeneration(config)).double()


def batch(heights, *, seed):
    """A row an image of so many times four patches; every row has ten tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 58, (len(heights), 10), generator=g)
    for row, h in enumerate(heights):
        ids[row, 1], ids[row, 2 : 2 + h] = 59, IMAGE
    labels = torch.where(ids == IMAGE, -100, ids)
    patches = torch.randn(4 * sum(heights), 12, generator=g, dtype=torch.float64)
    grid = torch.tensor([[1, 2, 2 * h] for h in heights])
    return {"input_ids": ids, "image_grid_thw": grid, "labels": labels}, patches


def loss_of(model, rows, patches):
    types = (rows["input_ids"] == IMAGE).long()
    return model(**rows, pixel_values=patches, mm_token_type_ids=types).loss


def gradient(model, rows, patches):
    model.zero_grad()
    loss_of(model, rows, patches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dots(model, train, patches, val):
    """Scores by brute force, and their scale."""
    direction, per_image = gradient(model, *val), train["image_grid_thw"].prod(1).tolist()
    alone = [
        gradient(model, {key: x[i : i + 1] for key, x in train.items()}, part)
        for i, part in enumerate(patches.split(per_image))
    ]
    scores = [sum((direction[n] * g[n]).sum() for n in direction) for g in alone]
    model.zero_grad()
    return torch.stack(scores), norm(direction) * torch.stack([norm(g) for g in alone])


def step(engine, train, patches, val_patches, number=0, compiled=None):
    engine.attach_train_batch(train, None, number, None)
    joint = engine.prepare_forward_input(train)[0]
    model = engine.model if compiled is None else compiled
    loss_of(model, joint, torch.cat([patches, val_patches])).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def engine_of(model, val):
    engine = GradDotProdEngine(model, val[0])
    engine.attach()
    return engine


@pytest.mark.parametrize(
    ("frozen", "batches"),
    [
        (False, [[2, 2, 2], [2, 2, 2, 2, 2], [1, 1, 1]]),
        (True, [[2, 3, 2], [3, 1, 2, 2], [2, 2, 2]]),
    ],
    ids=["of one size", "of many sizes, before a frozen tower"],
)
def test_images(frozen, batches, record_property):
    model = qwen_vl()
    model.model.visual.requires_grad_(not frozen)
    val = batch(2 * batches[0][-1:], seed=9)
    engine = engine_of(model, val)
    for number, heights in enumerate(batches):
        if heights[0] == 1:
            engine.detach()
            val = batch([1, 1], seed=9)
            engine = engine_of(model, val)
        train, patches = batch(heights, seed=number)
        engine.detach()
        want, scale = dots(model, train, patches, val)
        engine.reattach_after_evaluation()
        error = ((step(engine, train, patches, val[1], number) - want).abs() / scale).max().item()
        record_property("relative_error", error)
        assert error <= 1e-5


def test_pixtral(record_property):
    """Its tower has all images' patches in one sequence, (1, rows·patches, D)."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "head_dim": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config={"model_type": "mistral", "vocab_size": 61, "num_key_value_heads": 1, **sizes},
        vision_config={"model_type": "pixtral", "image_size": 8, "patch_size": 4, **sizes},
        image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = shaken(transformers.LlavaForConditionalGeneration(config)).double()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 58, (6, 10), generator=g)
    ids[:, 2:6] = IMAGE
    rows = {
        "input_ids": ids, "labels": torch.where(ids == IMAGE, -100, ids),
        "pixel_values": torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64),
        "image_sizes": torch.tensor([[8, 8]] * 6),
    }  # fmt: skip
    train, val = ({key: x[part] for key, x in rows.items()} for part in (slice(4), slice(4, 6)))
    want, scale = mapping_dots(model, train, val)
    engine = engine_of(model, (val,))
    engine.attach_train_batch(train, None, 0, None)
    model(**engine.prepare_forward_input(train)[0]).loss.backward()
    engine.prepare_gradients()
    error = ((engine.aggregate_and_log() - want).abs() / scale).max().item()
    record_property("relative_error", error)
    assert error <= 1e-5


def test_images_of_many_sizes_in_a_trained_tower_are_refused():
    """Also where half of the rows have half of the patches."""
    model, val = qwen_vl(), batch([3], seed=9)
    with pytest.raises(GraddotError, match="depends on other samples of the batch of 4 rows"):
        step(engine_of(model, val), *batch([1, 3, 1], seed=1), val[1])


def test_a_later_batch_of_other_sizes_is_judged_by_itself():
    model, val = qwen_vl(), batch([2], seed=9)
    engine = engine_of(model, val)
    train, patches = batch([2, 2, 2], seed=1)
    assert torch.isfinite(step(engine, train, patches, val[1])).all()
    with pytest.raises(GraddotError, match="depends on other samples of the batch of 4 rows"):
        step(engine, *batch([1, 3, 2], seed=2), val[1], 1)


class Pooled(nn.Module):
    """Patches, of as many an image, or in a grid, pooled beside tokens; one graph to a compiler."""

    def __init__(self, frozen):
        super().__init__()
        self.visual = nn.Linear(12, 8).requires_grad_(not frozen)
        self.tokens, self.head, self.frozen = nn.Embedding(61, 8), nn.Linear(8, 61), frozen
        self.double()

    def forward(self, input_ids, image_grid_thw, labels, pixel_values, mm_token_type_ids):
        patches, counts = self.visual(pixel_values).tanh(), image_grid_thw.prod(1)
        if self.frozen:
            row_of = torch.repeat_interleave(counts, output_size=len(patches))
            images = patches.new_zeros(len(counts), 8).index_add(0, row_of, patches)
        else:
            images = patches.view(len(counts), -1, 8).mean(1)
        logits = self.head(self.tokens(input_ids) + images[:, None])
        return ModelOutput(loss=F.cross_entropy(logits.transpose(1, 2), labels))


@pytest.mark.parametrize("frozen", [True, False])
def test_images_of_a_compiled_model(frozen):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, val, graphs = Pooled(frozen), batch([2], seed=9), []
    engine = engine_of(model, val)

    def run(number, heights, compiled):
        train, patches = batch(heights, seed=number)
        engine.detach()
        want, scale = dots(model, train, patches, val)
        engine.reattach_after_evaluation()
        scores = step(engine, train, patches, val[1], number, compiled)
        assert ((scores - want).abs() <= 1e-10 * scale).all()
        model.zero_grad()

    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph)
    sizes = [[2, 3, 1], [3, 1, 2], [1, 1, 2, 3]] if frozen else [[2, 2, 2], [2, 2, 2], [2, 2, 2, 2]]
    for number, heights in enumerate(sizes):
        run(number, heights, compiled)
        assert bool(graphs) == (number > 0)
    around = torch.compile(lambda **batch: model(**batch), backend="eager")
    if frozen:
        run(3, sizes[0], around)
        return
    with pytest.raises(
        GraddotError, match=r"compile the model, torch.compile\(model\), and no code"
    ):
        run(3, sizes[0], around)


class Features(nn.Module):
    """Returns the patches of each image beside its logits, as Mistral 3 and Qwen3-VL do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.double()

    def forward(self, pixel_values, labels):
        patches = self.visual(pixel_values.flatten(0, 1)).tanh().split(pixel_values.shape[1])
        logits = self.head(torch.stack(patches).mean(1))
        return ModelOutput(loss=F.cross_entropy(logits, labels), logits=logits, images=patches)


def test_as_many_patches_an_image_as_rows():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(6, 6, 12, generator=g, dtype=torch.float64)
    rows = {"pixel_values": images, "labels": torch.arange(6) % 5}
    train, val = ({key: x[part] for key, x in rows.items()} for part in (slice(4), slice(4, 6)))
    model = Features()
    want, scale = mapping_dots(model, train, val)
    engine = engine_of(model, (val,))
    engine.attach_train_batch(train, None, 0, None)
    model(**engine.prepare_forward_input(train)[0]).loss.backward()
    engine.prepare_gradients()
    assert ((engine.aggregate_and_log() - want).abs() <= 1e-10 * scale).all()
