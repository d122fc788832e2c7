"""Evaluation sets that cannot be scored: one line each, before a model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from evaluation import layouts

from tracer.models.imagenet import wnids


def unknown_wnid(root):
    layouts.class_folders(root, [*wnids()[:3], "n99999999"], "{}.png")


def missing_mapping(root):
    layouts.objectnet(root)
    (root / "mappings/objectnet_to_imagenet_1k.json").unlink()


def no_mappings(root):
    layouts.class_folders(root / "objectnet-1.0/images", ["tie", "banana"], "{}.png")
    return root / "objectnet-1.0"


def mappings_of_another_release(root):
    layouts.objectnet(root)
    (root / "mappings/imagenet_to_label_2012_v2").write_text("tench\n")


def wrong_split(root):
    return Path(f"{layouts.iwildcam(root)}:ood_test")


def no_rows_of_a_split(root):
    layouts.iwildcam(root)
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text("\n".join(x for x in text.splitlines() if ",id_test," not in x))


def no_species(root):
    layouts.iwildcam(root)
    (root / "categories.csv").unlink()


def species_without_a_name(root):
    layouts.iwildcam(root)
    lines = (root / "categories.csv").read_text().splitlines()
    (root / "categories.csv").write_text("\n".join(lines[:-1]))


def a_column_less(root):
    layouts.fmow(root)
    text = (root / "rgb_metadata.csv").read_text()
    (root / "rgb_metadata.csv").write_text(text.replace("timestamp", "time", 1))


def no_countries(root):
    layouts.fmow(root)
    (root / "country_code_mapping.csv").unlink()


def captions_of_training(root):
    path = layouts.coco_of_clip_benchmark(root)
    return path.rename(root / "coco_train_karpathy.json")


def captions_of_all_of_coco(root):
    path = layouts.coco_of_clip_benchmark(root)
    return path.rename(root / "captions_val2014.json")


def no_test_split(root):
    layouts.karpathy(root)
    path = root / "dataset_coco.json"
    path.write_text(path.read_text().replace('"test"', '"val"'))


def captions_of_other_pictures(root):
    layouts.flickr_of_clip_benchmark(root)
    text = (root / "flickr30k_test_karpathy.txt").read_text()
    (root / "flickr30k_test_karpathy.txt").write_text(text.replace(".jpg", "9.jpg"))


def damaged_captions(root):
    (root / "dataset_coco.json").write_text("{")


def a_picture_without_captions(root):
    path = layouts.coco_of_clip_benchmark(root)
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 103]
    path.write_text(json.dumps(content))


def no_such_part(root):
    return Path(f"{layouts.coop(root)}:testing")


def another_json(root):
    (root / "split_zhou_Sorts.json").write_text('{"test": [["a.jpg", 1]]}')
    return root / "split_zhou_Sorts.json"


def one_class(root):
    rows = [{"image": f"{n}.png", "label": "owl"} for n in range(3)]
    for n in range(3):
        layouts.picture(root / f"{n}.png", n)
    layouts.write_csv(root / "owls.csv", rows)
    (root / "classes.json").write_text(json.dumps({"owl": ["an owl"], "fox": ["a fox"]}))
    return root / "owls.csv"


CASES = {
    unknown_wnid: r"has 1 class folder whose name is not a wnid of ImageNet's 1000 classes \('n99999999'\): move",
    missing_mapping: r"ObjectNet's mapping '.*objectnet_to_imagenet_1k.json' is missing: unpack",
    no_mappings: r"ObjectNet's mapping '.*folder_to_objectnet_label.json' is missing: unpack",
    mappings_of_another_release: r"ObjectNet's mappings in '.*mappings' do not fit together .*: unpack",
    wrong_split: r"there is no split 'ood_test': the splits are train, id_val, id_test, val, test",
    no_rows_of_a_split: r"metadata.csv' has no rows of the split 'id_test': check the file",
    no_species: r"categories.csv' is missing, which names iWildCam's classes: unpack",
    species_without_a_name: r"categories.csv' has no name for class 3: unpack",
    a_column_less: r"rgb_metadata.csv' lacks the column 'timestamp': unpack",
    no_countries: r"country_code_mapping.csv' cannot be read \(No such file or directory\): unpack",
    captions_of_training: r"coco_train_karpathy.json' holds captions of the split 'train', not of test: give",
    captions_of_all_of_coco: r"captions_val2014.json' holds captions of the split 'captions_val2014', not of test",
    no_test_split: r"dataset_coco.json' has no pictures of the split test \(it has restval, train, val\)",
    captions_of_other_pictures: r"names 6 pictures, and none is beside it, .* those of another split",
    damaged_captions: r"dataset_coco.json' is not JSON in UTF-8 .*: download it again",
    a_picture_without_captions: r"has no caption for 'COCO_val2014_000000000003.jpg': download",
    no_such_part: r"there is no split 'testing': the splits are train, val, test",
    another_json: r"split_zhou_Sorts.json' is not a split of CoOp's .*: it holds train, val and test",
}


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_one_line_before_a_model_is_loaded(build, refusal, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    path = build(root) or root
    line = refusal(path, model="no-such-model")
    assert re.search(CASES[build], line), line


def test_pictures_of_one_class_alone(refusal, tmp_path):
    path = one_class(tmp_path)
    line = refusal(path, model="no-such-model", classes=tmp_path / "classes.json")
    assert "all pictures of 'set' are of one class ('owl')" in line


def test_a_class_without_prompts(refusal, tmp_path):
    layouts.class_folders(tmp_path / "data", ["fox", "owl", "seal"], "{}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"owl": ["an owl"], "fox": ["a fox"]}))
    line = refusal(tmp_path / "data", model="no-such-model", classes=tmp_path / "classes.json")
    assert "'set' has 1 label without prompts, first 'seal': add what is missing to --classes" in line


def test_an_empty_set(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refusal(tmp_path / "empty", model="no-such-model")
    layouts.write_csv(tmp_path / "empty.csv", [{"image": "", "label": ""}])
    (tmp_path / "empty.csv").write_text("image,label\n")
    assert "holds no pictures" in refusal(tmp_path / "empty.csv", model="no-such-model")


def test_wnids_with_names_of_their_own_are_the_users(evaluate, tmp_path):
    layouts.class_folders(tmp_path / "data", ["n99999998", "n99999999"], "{}.png")
    (tmp_path / "data/classes.json").write_text(json.dumps({"n99999998": "fox", "n99999999": "owl"}))
    code, stderr = evaluate(tmp_path / "data")
    assert code == 0, stderr
