"""Figures beside PSNR and SSIM: CLIP and LPIPS without a download, by category of prompts, and by frame."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import layercache
from layercache._utils import metrics
from layercache.errors import ArgumentError, FileFormatError, MissingExtraError
from layercache.methods import Uniform
from layercache.tools.batch.entries import read_file
from layercache.tools.cli.compare import seeds_of
from layercache.tools.compare.calls import PictureCalls
from layercache.tools.compare.categories import category_table
from layercache.tools.compare.clip import ClipScore
from layercache.tools.compare.files import Outcome
from layercache.tools.compare.report import comparison_table, frame_rows, save_page
from layercache.tools.compare.scores import Scorer, scorer_of
from support.text import plain_text
from support.tiny import calm_pipeline

CALL = {"num_inference_steps": 4, "guidance_scale": 1.0}
WORDS = ["a", "cat", "coffee", "of", "photo"]
PROMPTS = [{"prompt": "cat", "category": "animals"}, "coffee", {"prompt": "retina", "category": "animals"}]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of random weights, with a tokenizer of single letters and an image processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(k) for k in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():  # as it is made, all pictures look the same to it
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def cosine(folder, picture, text):
    """100 times the cosine of the embeddings, without what prepares the inputs of `ClipScore`."""
    model = CLIPModel.from_pretrained(folder).eval()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(picture.round(decimals=8)) * 255).round() / 255 - mean) / std
    ids = CLIPTokenizer.from_pretrained(folder)(text).input_ids[:12]
    ids = [*ids[:11], 1]
    with torch.no_grad():
        found = model(torch.tensor([ids]), pixels.permute(2, 0, 1)[None].float())
    return 100 * max(0.0, float(torch.cosine_similarity(found.image_embeds, found.text_embeds)))


def test_clip_scores_are_the_cosines_of_the_embeddings(clip_folder):
    random = np.random.default_rng(0)
    pictures = random.random((3, 32, 32, 3)).astype(np.float32)
    texts, score = ["cat", "a photo of coffee", "of a cat"], ClipScore(clip_folder)
    expected = [cosine(clip_folder, picture, text) for picture, text in zip(pictures, texts, strict=True)]
    assert score(pictures, texts) == pytest.approx(expected, abs=1e-3) and max(expected) > 1
    # of a video the mean over its frames
    (video,) = score(pictures[None], ["a cat"])
    assert video == pytest.approx(np.mean(score(pictures, ["a cat"] * 3)), abs=1e-4)


def stub_torchvision(monkeypatch, tmp_path):
    for name, content in (
        ("lpips", {}),
        ("torchvision", {}),
        (
            "torchvision.models",
            {"AlexNet_Weights": types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="x/a.pth"))},
        ),
    ):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_what_is_missing_for_a_figure_is_said_before_the_work(monkeypatch, tmp_path, clip_folder):
    (tmp_path / "clip").mkdir()
    for name, said in (("no/such-model", "not in the cache of the Hub"), (tmp_path / "clip", "not a whole CLIP model")):
        with pytest.raises(ArgumentError, match=f"{said}.*downloads nothing") as caught:
            scorer_of(clip=name)
        assert caught.value.argument == "clip"
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "layercache\[lpips\]"'):
        scorer_of(lpips=True)
    assert scorer_of() == Scorer() and scorer_of(lpips=False) == Scorer()
    monkeypatch.undo()
    stub_torchvision(monkeypatch, tmp_path)
    with pytest.raises(
        ArgumentError, match=r"not at .*elsewhere\.pth, and layercache downloads nothing: fetch x/a.pth"
    ):
        scorer_of(lpips=tmp_path / "elsewhere.pth")
    (tmp_path / "a.pth").touch()
    assert scorer_of(lpips=tmp_path).lpips and not scorer_of().lpips
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"layercache\[diffusers\]"):
        scorer_of(clip=clip_folder)


# --- by category of prompts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory, clip_folder):
    pipe, folder = calm_pipeline(2), tmp_path_factory.mktemp("compare")
    settings = {"budgets": (0.5,), "batch": 3, "repeats": 1, "folder": folder, "progress": False, **CALL}
    ran = []
    run = PictureCalls.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureCalls, "run", lambda *args: ran.append(1) or run(*args))
        plain = layercache.compare(pipe, {"mine": Uniform(interval=2)}, PROMPTS, **settings)
        before = len(ran)
        again = layercache.compare(pipe, {"mine": Uniform(interval=2)}, PROMPTS, clip=clip_folder, **settings)
        between = len(ran)
        layercache.compare(pipe, {"mine": Uniform(interval=2)}, PROMPTS, clip=clip_folder, **settings)
    return plain, again, (before, between, len(ran))


def test_figures_by_category_are_those_of_its_pictures(compared):
    table = compared[1]
    (row,), (animals, none) = table.rows, table.categories
    assert (animals.category, animals.pictures, none.category, none.pictures) == ("animals", 2, "(none)", 1)
    assert animals.psnr_mean == pytest.approx(np.mean([row.psnr[0], row.psnr[2]])) and none.psnr_mean == row.psnr[1]
    assert animals.psnr_worst == min(row.psnr[0], row.psnr[2]) and none.psnr_p10 == row.psnr[1]
    assert (2 * animals.ssim + none.ssim) / 3 == pytest.approx(row.ssim)
    assert (2 * animals.clip + none.clip) / 3 == pytest.approx(row.clip)
    frame = table.to_pandas(by="category")
    assert list(frame["category"]) == ["animals", "(none)"] and frame["psnr_mean"][0] == animals.psnr_mean
    assert [one["pictures"] for one in json.loads(table.to_json())["categories"]] == [2, 1]
    assert "by category (animals, (none))" in repr(table)
    with pytest.raises(ArgumentError, match="by is 'method' or 'category'"):
        table.to_pandas(by="seed")
    page = table.save_html(table.files.folder / "page.html").read_text()
    assert "By category of prompts" in page and "CLIP of the full run" in page
    assert layercache.measure(calm_pipeline(2), Uniform(), PROMPTS, batch=3, repeats=1, **CALL).by_category.keys() == {
        "animals",
        "",
    }


def test_a_score_that_is_asked_for_later_is_computed_then(compared):
    plain, again, (before, between, after) = compared
    assert plain.rows[0].clip is None and again.rows[0].clip is not None
    assert again.full_clip == pytest.approx(np.mean(again.files.full_clip)) and len(again.files.full_clip) == 3
    assert plain.rows[0].psnr == again.rows[0].psnr and before < between == after


def test_tables_of_prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt, category,seed,guidance_scale,negative_prompt\r\n"
        b'"a fox, red",animals,7,2.5,1\r\n\r\ntwo,,,,\r\n"three\nlines",animals,,,\r\n'
    )
    first, second, third = read_file(path, seed=3)
    assert first.arguments == {"prompt": "a fox, red", "guidance_scale": 2.5, "negative_prompt": "1"}
    assert (first.category, first.seed, first.has_own_seed) == ("animals", 7, True)
    assert (second.sample, second.category, second.seed, second.has_own_seed) == ("two", "", 4, False)
    assert third.arguments["prompt"] == "three\nlines" and third.seed == 5
    assert seeds_of([first, second, third], 5) == [7, 1, 2, 8, 9] and seeds_of([second], 3) == [0, 1, 2]
    path.with_suffix(".tsv").write_text("category\tprompt\nfood\ta, b\n")
    assert [(one.sample, one.category) for one in read_file(path.with_suffix(".tsv"))] == [("a, b", "food")]
    path.with_suffix(".jsonl").write_text('{"prompt": "x", "category": "food"}\n')
    assert read_file(path.with_suffix(".jsonl"))[0].category == "food"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a fox\na dog\n", "names its columns, each once and one of them prompt"),
        ("prompt,prompt\na,b\n", "each once"),
        ("prompt,seed\nx,\ny,-1\n", "line 3: the seed is a whole number"),
        ("prompt,seed\nx,1,2\n", "line 2: it has more cells than the 2 columns"),
        ("prompt,generator\nx,1\n", "generator is set by the command"),
        ('prompt\n"x\n', "unexpected end of data"),
        ("prompt\n\n", "holds no prompts"),
        ("", "got nothing"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, said):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=said) as caught:
        read_file(path)
    assert caught.value.argument == "prompts_file"


# --- by frame ------------------------------------------------------------------------------------------------------


def videos():
    random = np.random.default_rng(1)
    full = 0.3 + 0.4 * random.random((2, 6, 16, 16, 3))
    return full, 0.05 * random.standard_normal(full.shape)


def test_changes_from_frame_to_frame():
    full, noise = videos()
    still = np.broadcast_to(noise[:, :1], full.shape)
    signs = np.array([1, -1] * 3)[:, None, None, None]
    psnr = np.array(metrics.psnr(full, full + still))
    assert min(metrics.temporal_psnr(full, full + still)) > 250  # what stands still is no change
    assert metrics.temporal_psnr(full, full + still * signs) == pytest.approx(psnr - 20 * np.log10(2))
    own = metrics.temporal_psnr(full, full + noise)
    differences = np.diff(full + noise, axis=1) - np.diff(full, axis=1)
    assert own == pytest.approx(-10 * np.log10((differences**2).reshape(2, -1).mean(axis=1)))
    assert own == pytest.approx(np.array(metrics.psnr(full, full + noise)) - 10 * np.log10(2), abs=0.5)
    assert (
        metrics.temporal_psnr(full, full) == metrics.temporal_psnr(full[:, :1], (full + noise)[:, :1]) == [np.inf] * 2
    )


def test_figures_of_frames_are_in_every_form(tmp_path):
    full, noise = videos()
    noise[1, 4] *= 3
    full, cached = full.astype(np.float32), np.clip(full + noise, 0, 1).astype(np.float32)
    found = Scorer().fidelity(full, cached)
    assert found.frame_psnr[1] == pytest.approx(metrics.psnr(full[1], cached[1]))
    assert found.ssim == pytest.approx([np.mean(curve) for curve in found.frame_ssim])
    assert int(np.argmin(found.frame_psnr[1])) == 4
    figures = {name: getattr(found, name) for name in ("psnr", "ssim", "frame_psnr", "frame_ssim", "temporal_psnr")}
    outcome = Outcome(
        "mine", "", 0.5, used=0.5, seconds=1.0, speedup=2.0, speedups=(2.0,), operators=1.0, reads=0.0, **figures
    )
    assert Outcome.from_json(json.loads(json.dumps(vars(outcome)))) == outcome
    text = plain_text(comparison_table([outcome]), 200)
    assert "worst frame" in text and f"{min(found.frame_psnr[1]):.2f}" in text and "temporal" in text
    rows = frame_rows([outcome])
    assert [row["frame"] for row in rows] == list(range(6))
    assert rows[4]["psnr"] == pytest.approx(np.mean([curve[4] for curve in found.frame_psnr]))
    page = save_page(tmp_path / "page.html", [outcome], "videos", categories=["a", "b"]).read_text()
    assert "Frame by frame" in page and "By category of prompts" in page
    assert category_table([outcome], []) is None
