"""Every layout that is recognised, on a miniature of it, with scores worked out in plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from evaluation import layouts
from PIL import Image
from torch import nn

from tracer.data.config import LoadingSettings
from tracer.evaluation.recognise import read_sets
from tracer.evaluation.zero_shot import evaluate_sets
from tracer.models.clip import Clip, openai_templates
from tracer.models.imagenet import names, wnids
from tracer.models.picture_format import PictureFormat

WIDTH = 8


class Texts:
    """A tokenizer that numbers texts as they come, and the feature of each."""

    def __init__(self):
        self.known, self.random = {}, np.random.default_rng(3)
        self.table = self.random.normal(size=(200_000, WIDTH)).astype(np.float32)

    def __call__(self, texts):
        return torch.tensor([[self.known.setdefault(text, len(self.known))] for text in texts])

    def feature(self, text):
        return self.table[self.known[text]]


class Projected(nn.Module):
    """A dual encoder whose features can be read off: a picture's mean colour, projected, and a table of texts."""

    def __init__(self, texts):
        super().__init__()
        self.table = torch.from_numpy(texts.table)
        self.projection = nn.Parameter(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)))
        self.logit_scale = nn.Parameter(torch.tensor([1.0]))

    def encode_image(self, image, normalize=False):
        return nn.functional.normalize((image.mean((2, 3)) - 0.5) @ self.projection, dim=-1)

    def encode_text(self, text, normalize=False):
        return nn.functional.normalize(self.table[text[:, 0]], dim=-1)


@pytest.fixture(scope="module")
def clip():
    texts = Texts()
    wanted = PictureFormat(6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Clip("projected", Projected(texts), texts, wanted)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def picture_features(clip, colours):
    return unit((np.asarray(colours) / 255 - 0.5) @ clip.model.projection.detach().numpy())


def logits_of(clip, colours, prompts):
    """Logits of pictures of plain colours among classes with these lists of prompts."""
    weights = unit(
        np.stack([unit(np.stack([clip.tokenizer.feature(t) for t in g])).mean(0) for g in prompts])
    )
    return np.exp(1.0) * picture_features(clip, colours) @ weights.T


def score(clip, path: Path, name: str = "set", **options) -> dict:
    sets = read_sets({name: path}, LoadingSettings(workers=1), **options)
    scored = evaluate_sets(clip, sets, workers=1)
    return {key: each.score for key, each in scored.items()}


def check(score, logits, truth):
    """Compare accuracy, top-5 and NLL with those of the logits."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    truth = np.asarray(truth)
    assert score["accuracy"] == pytest.approx((logits.argmax(1) == truth).mean())
    assert score["nll"] == pytest.approx(-np.log(p[np.arange(len(truth)), truth]).mean(), rel=1e-4)
    if logits.shape[1] > 5:
        first = np.argsort(-logits, 1)[:, :5]
        assert score["top5"] == pytest.approx((first == truth[:, None]).any(1).mean())
    return p


def imagenet_prompts():
    return [[t.replace("{}", name) for t in openai_templates()] for name in names().values()]


def test_the_classes_of_imagenet():
    """Against facts known from elsewhere: two names occur twice, so that a dictionary by name has 998."""
    assert len(set(wnids())) == 1000
    assert len(set(names().values())) == 998
    assert names()["n01440764"] == "tench"
    assert names()["n04356056"] == names()["n04355933"] == "sunglasses"
    assert [len(wnids(subset)) for subset in "ar"] == [200, 200]
    assert wnids("a")[:2] == ("n01498041", "n01531178")
    assert wnids("r")[0] == "n01443537"


@pytest.mark.parametrize(
    ("layout", "name", "size", "folders"),
    [
        (layouts.imagenet, "ImageNet", 50_000, wnids()),
        (layouts.sketch, "ImageNet-Sketch", 50_889, wnids()[:60]),
        (layouts.v2, "ImageNet-V2", 10_000, wnids()),
        (layouts.adversarial, "ImageNet-A", 7_500, wnids("a")),
        (layouts.renditions, "ImageNet-R", 30_000, wnids("r")),
    ],
)
def test_sets_of_imagenets_classes(clip, tmp_path, layout, name, size, folders):
    (own,) = score(clip, layout(tmp_path / "data")).values()
    assert (own["set"], own["expected"], own["pictures"]) == (name, size, len(folders))
    logits = logits_of(clip, layouts.COLOURS[: len(folders)], imagenet_prompts())
    if len(folders) == 200:  # their classes' logits only
        rows = [wnids().index(wnid) for wnid in folders]
        check(own, logits[:, rows], range(200))
    else:  # wnids in the order of the class numbers; -V2's folders in numeric order, not 0, 1, 10, 100
        check(own, logits, range(len(folders)))


def test_a_set_with_other_names_of_files_is_told_by_its_classes(tmp_path):
    paths = {subset: layouts.class_folders(tmp_path / subset, wnids(subset), "{}.png") for subset in "ar"}
    paths["some"] = layouts.class_folders(tmp_path / "some", wnids()[10:20], "{}.png")
    sets = read_sets(paths, LoadingSettings(workers=1))
    assert [each.layout for each in sets] == ["ImageNet-A", "ImageNet-R", "ImageNet classes"]
    assert sets[2].class_ids == list(wnids()[10:20])
    assert sets[2].expected is None
    assert sets[0].prompts is sets[1].prompts  # text features are computed once


def test_objectnet(clip, tmp_path):
    (own,) = score(clip, layouts.objectnet(tmp_path / "objectnet-1.0")).values()
    assert (own["set"], own["expected"], own["pictures"]) == ("ObjectNet", 18_574, 6)
    folders = sorted(layouts.OBJECTNET)
    numbers = {folder: 2 * n for n, folder in enumerate(layouts.OBJECTNET)}
    # The red border is not part of the colour, and each class has the largest of its logits.
    colours = [layouts.COLOURS[numbers[folder] + n] for folder in folders for n in range(2)]
    logits = logits_of(clip, colours, imagenet_prompts())
    merged = np.stack([logits[:, classes].max(1) for _, classes in layouts.OBJECTNET.values()], 1)
    check(own, merged, [list(layouts.OBJECTNET).index(folder) for folder in folders for _ in range(2)])


@pytest.mark.parametrize("transparent", [False, True])
def test_the_border_is_cut_off_by_both_loaders(tmp_path, transparent):
    from dataclasses import replace

    from tracer.data.build import read_index
    from tracer.data.decoded import DecodedPictures

    for n, kind in enumerate(("png", "jpeg")):
        layouts.picture(tmp_path / str(n) / f"a.{kind}", n, border=2)
    if transparent:
        Image.open(tmp_path / "0/a.png").convert("RGBA").save(tmp_path / "0/a.png")
    index = replace(read_index(tmp_path), border=2)
    wanted = PictureFormat(6, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for loader in ("torch", "dali"):
        settings = LoadingSettings(workers=1, loader=loader)
        ((pictures, _),) = DecodedPictures(0, settings).batches(index, wanted, 4, 1, torch.device("cpu"))
        np.testing.assert_allclose(pictures[0, :, 3, 3] * 255, layouts.COLOURS[0], atol=1)
        np.testing.assert_allclose(pictures.amax((2, 3)), pictures.amin((2, 3)), atol=0.02)


def test_iwildcam(clip, tmp_path):
    scores = score(clip, layouts.iwildcam(tmp_path / "iwildcam_v2.0"), "wild")
    assert list(scores) == ["wild-id_val", "wild-id_test", "wild-test"]
    prompts = [
        [f"a photo of {name}.", f"{name} in the wild."]
        for name in ("empty", "tayassu pecari", "dasyprocta punctata", "cuniculus paca")
    ]
    for place, own in zip((2, 3, 4), scores.values(), strict=True):
        rows = list(range(place, 40, 5))
        truth = np.array([(n // 5) % 3 for n in rows])
        logits = logits_of(clip, layouts.COLOURS[rows], prompts)  # the class of training alone is one of four
        check(own, logits, truth)
        f1 = []
        for c in np.unique(truth):
            both = (logits.argmax(1) == c).sum() + (truth == c).sum()
            f1.append(2 * ((logits.argmax(1) == c) & (truth == c)).sum() / both)
        assert own["macro_f1"] == pytest.approx(np.mean(f1))
        assert (own["measure"], own["expected"], own["groups"]) == ("macro_f1", 8, 4)  # cameras
    one = score(clip, Path(f"{tmp_path / 'iwildcam_v2.0'}:val"), "one")
    assert {name: each["pictures"] for name, each in one.items()} == {"one": 8}


def test_fmow(clip, tmp_path):
    scores = score(clip, layouts.fmow(tmp_path / "fmow_v1.1"), "map")
    prompts = [
        [f"a satellite photo of a {name}.", f"an aerial photo of a {name}."]
        for name in ("airport", "barn", "zoo")
    ]
    rows = {"map-id_val": [2, 7], "map-id_test": [4, 5], "map-test": list(range(8, 32))}
    assert {name: each["pictures"] for name, each in scores.items()} == {n: len(r) for n, r in rows.items()}
    for name, own in scores.items():
        truth = np.array([("airport", "barn", "zoo").index(layouts.FMOW_ROWS[n][2]) for n in rows[name]])
        logits = logits_of(clip, layouts.COLOURS[rows[name]], prompts)
        check(own, logits, truth)
    right = logits.argmax(1) == truth
    country = np.array([layouts.FMOW_ROWS[n][3] for n in rows["map-test"]])
    worst = {c: right[country == c].mean() for c in ("USA", "KEN", "JPN")}  # not XXX, whose region is Other
    assert scores["map-test"]["worst_region"] == pytest.approx(min(worst.values()))
    assert scores["map-test"]["measure"] == "worst_region"
    assert scores["map-test"]["groups"] == 4


def expected_recalls(clip, colours, texts):
    """R@1, 5 and 10 both ways, by sorting; texts are the lists of captions of each picture."""
    captions = [text for group in texts for text in group]
    owner = np.array([n for n, group in enumerate(texts) for _ in group])
    features = unit(np.stack([clip.tokenizer.feature(text) for text in captions]))
    similarity = (picture_features(clip, colours).astype(np.float32) @ features.T).round(6)
    by_picture = np.argsort(-similarity, 1, kind="stable")
    by_caption = np.argsort(-similarity.T, 1, kind="stable")
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_to_text_r{k}"] = (
            (owner[by_picture[:, :k]] == np.arange(len(texts))[:, None]).any(1).mean()
        )
        expected[f"text_to_image_r{k}"] = (by_caption[:, :k] == owner[:, None]).any(1).mean()
    return expected


@pytest.mark.parametrize(
    ("layout", "name", "size"),
    [
        (layouts.karpathy, "COCO", 5_000),
        (layouts.coco_of_clip_benchmark, "COCO", 5_000),
        (layouts.flickr_of_clip_benchmark, "Flickr30k", 1_000),
    ],
)
def test_captions(clip, tmp_path, layout, name, size):
    pictures = 14
    (own,) = score(clip, layout(tmp_path, pictures)).values()
    assert (own["set"], own["expected"], own["pictures"]) == (name, size, pictures)
    texts = [list(dict.fromkeys(layouts.captions(n))) for n in range(pictures)]
    assert own["captions"] == sum(map(len, texts))
    for key, value in expected_recalls(clip, layouts.COLOURS[:pictures], texts).items():
        assert own[key] == pytest.approx(value), key
    assert own["groups"] == pictures


def test_coop(clip, tmp_path):
    (own,) = score(clip, layouts.coop(tmp_path)).values()
    assert own["pictures"] == own["expected"] == 9
    prompts = [[f"a photo of a sort {n}"] for n in range(4)]
    check(own, logits_of(clip, layouts.COLOURS[40:49], prompts), [n % 3 for n in range(9)])
    (own,) = score(clip, Path(f"{tmp_path / 'split_zhou_Sorts.json'}:val")).values()
    check(own, logits_of(clip, layouts.COLOURS[20:29], prompts), [n % 4 for n in range(9)])


def test_shards_of_clip_benchmark(clip, tmp_path):
    import io
    import tarfile

    def shard(files):
        with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    layouts.picture(tmp_path / "p.png", 0)
    pictures = []
    for n in range(12):
        layouts.picture(tmp_path / "p.png", n)
        pictures.append((tmp_path / "p.png").read_bytes())
    (tmp_path / "classnames.txt").write_text("red fox\nowl\nsea lion")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c} indeed.\none {c}")
    shard({k: v for n, p in enumerate(pictures) for k, v in ((f"{n}.png", p), (f"{n}.cls", b"%d" % (n % 3)))})
    (own,) = score(clip, tmp_path).values()
    prompts = [[f"a {name} indeed.", f"one {name}"] for name in ("red fox", "owl", "sea lion")]
    check(own, logits_of(clip, layouts.COLOURS[:12], prompts), [n % 3 for n in range(12)])

    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / name).unlink()
    texts = [layouts.captions(n)[:3] for n in range(12)]
    lines = {f"{n}.txt": "\n".join(group).encode() for n, group in enumerate(texts)}
    shard(
        {k: v for n, p in enumerate(pictures) for k, v in ((f"{n}.png", p), (f"{n}.txt", lines[f"{n}.txt"]))}
    )
    (own,) = score(clip, tmp_path).values()
    for key, value in expected_recalls(clip, layouts.COLOURS[:12], texts).items():
        assert own[key] == pytest.approx(value), key


def test_a_column_of_groups(tmp_path):
    rows = [{"image": f"{n}.png", "label": "ab"[n % 2], "group": f"hand {n % 3}"} for n in range(6)]
    for n in range(6):
        layouts.picture(tmp_path / f"{n}.png", n)
    layouts.write_csv(tmp_path / "icons.csv", rows)
    pandas.DataFrame(rows).to_parquet(tmp_path / "icons.parquet")
    for name in ("icons.csv", "icons.parquet"):  # Regression: that of Parquet was not read
        (own,) = read_sets({"icons": tmp_path / name}, LoadingSettings(workers=1))
        assert (own.groups.tolist(), own.grouped_by) == ([0, 1, 2, 0, 1, 2], "group")


def test_groups_of_a_table_named_from_its_own_folder(tmp_path, monkeypatch):
    """Regression: a KeyError for the path of each picture, which is written in more than one way."""
    for n in range(4):
        layouts.picture(tmp_path / f"{n}.png", n)
    rows = [f"./{n}.png, {'ab'[n % 2]}, hand {n // 2} " for n in range(4)]
    (tmp_path / "icons.csv").write_text("\n".join(["image , label, group ", *rows, ""]))
    monkeypatch.chdir(tmp_path)
    (own,) = read_sets({"icons": Path("icons.csv")}, LoadingSettings(workers=1))
    assert (own.groups.tolist(), own.grouped_by) == ([0, 0, 1, 1], "group")


def test_prompts_of_the_users_own_for_a_published_set(clip, tmp_path):
    layouts.adversarial(tmp_path / "a")
    given = {wnid: [f"class {wnid}"] for wnid in wnids("a")}
    (tmp_path / "classes.json").write_text(json.dumps(given))
    (own,) = score(clip, tmp_path / "a", classes=tmp_path / "classes.json").values()
    check(own, logits_of(clip, layouts.COLOURS[:200], list(given.values())), range(200))
