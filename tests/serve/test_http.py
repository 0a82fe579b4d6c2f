"""What clients of a real engine get: the very records of iqa-run, by every way in; clear words for everything else."""

import base64
import io
import json
import logging
import random
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffiqa
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import MANIFEST, read_manifest
from diffiqa.runtime.command.records import Record, RunSettings
from diffiqa.runtime.scorer import Scorer, load
from diffiqa.serve.limits import Limits
from diffiqa.serve.work import Service

from ..tiny import photo
from .serving import Answer, Running, running, until

OPTIONS = {"crops": 2, "seed": 3, "mode": "crop"}
QUERY = "crops=2&seed=3&mode=crop"


@pytest.fixture(scope="module")
def site(scorer: Scorer, tiny_engine: Path) -> Iterator[Running]:
    limits = Limits(body_bytes=200_000, pixels=4000, images=8, seconds=120)
    directories = {"tiny": tiny_engine}
    own = load(tiny_engine, max_pixels=limits.pixels)
    with own, running(Service({"tiny": own}, limits, directories=directories)) as found:
        found.service.warm_up()
        yield found


def png(seed: int, height: int = 32, width: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(seed, height, width)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files by name; one of them is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    made = {f"{name}.png": png(seed) for seed, name in enumerate("abc")} | {"notes.txt": b"no image"}
    return {str(folder / name): data for name, data in made.items()}


@pytest.fixture(scope="module")
def expected(tiny_engine: Path, pictures: dict[str, bytes]) -> list[dict[str, Any]]:
    """The records of iqa-run."""
    for name, data in pictures.items():
        Path(name).write_bytes(data)
    done = diffiqa.score(tiny_engine, list(pictures), options=diffiqa.Options(**OPTIONS))  # type: ignore[arg-type]
    return [timeless(encode(record)) for record in done.records]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def form(files: dict[str, bytes], boundary: str = "b0undary") -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + data
        for name, data in files.items()
    ]
    body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def refused(answer: Answer, status: int, *says: str) -> bool:
    """Whether an answer has this status, and JSON with an error that says all this."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.status == status, answer.body
    return all(word in answer.json["error"] for word in says)


def test_a_form_gives_the_records_of_iqa_run(
    site: Running, pictures: dict[str, bytes], expected: list[dict[str, Any]]
) -> None:
    body, headers = form(pictures)
    answer = site.ask("POST", f"/score?{QUERY}", body, headers)
    assert answer.status == 200
    assert [timeless(record) for record in answer.json] == expected
    lines = site.ask("POST", f"/score?{QUERY}&format=jsonl&engine=tiny", body, headers).body.splitlines()
    assert [timeless(json.loads(line)) for line in lines] == expected
    assert expected[3]["status"] == "error"


def test_an_image_as_body_gives_its_record_whoever_else_asks(
    site: Running, pictures: dict[str, bytes], expected: list[dict[str, Any]]
) -> None:
    got: dict[tuple[int, int], Answer] = {}

    def ask(client: int) -> None:
        for number in random.Random(client).sample(range(4), 4):  # noqa: S311
            name = list(pictures)[number]
            got[client, number] = site.ask("POST", f"/score?{QUERY}&name={name}", pictures[name])

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(got) == 16
    for (_, number), answer in got.items():
        assert timeless(answer.json) == expected[number]
        assert answer.status == (422 if number == 3 else 200)


def test_the_inference_protocol_gives_the_same_in_binary_and_in_json(
    site: Running, pictures: dict[str, bytes], expected: list[dict[str, Any]]
) -> None:
    images = list(pictures.values())[:3]
    data = b"".join(struct.pack("<I", len(image)) + image for image in images)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [3], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"id": "7", "inputs": [tensor], "parameters": {**OPTIONS, "binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    binary = site.ask("POST", "/v2/models/tiny/infer", head + data, headers)
    end = int(binary.headers["inference-header-content-length"])
    answer = json.loads(binary.body[:end])
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "tiny", expected[0]["engine"])
    assert answer["outputs"][0]["parameters"]["binary_data_size"] == 24
    scores = [record["score"] for record in expected[:3]]
    assert list(struct.unpack("<3d", binary.body[end : end + 24])) == scores

    tensor = {"name": "image", "datatype": "BYTES", "shape": [3, 1]}
    tensor["data"] = [base64.b64encode(image).decode() for image in images]
    request = {"inputs": [tensor], "parameters": OPTIONS, "outputs": [{"name": "record"}, {"name": "score"}]}
    version = f"versions/{expected[0]['engine']}"
    texts = site.ask("POST", f"/v2/models/tiny/{version}/infer", json.dumps(request)).json["outputs"]
    assert [output["name"] for output in texts] == ["record", "score"]
    assert texts[1]["data"] == scores
    assert [json.loads(text)["digest"] for text in texts[0]["data"]] == [record["digest"] for record in expected[:3]]


def test_a_real_client_of_the_protocol_gets_the_score(site: Running, pictures: dict[str, bytes]) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    numpy = pytest.importorskip("numpy")
    client = triton.InferenceServerClient(f"127.0.0.1:{site.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_model_metadata("tiny")["outputs"][0]["name"] == "score"
    data = list(pictures.values())
    want = [site.ask("POST", f"/score?{QUERY}", image).json["score"] for image in data[:3]]
    for binary in (True, False):
        tensor = triton.InferInput("image", [3], "BYTES")
        if binary:
            tensor.set_data_from_numpy(numpy.array(data[:3], dtype=object))
        else:
            texts = [base64.b64encode(image) for image in data[:3]]
            tensor.set_data_from_numpy(numpy.array(texts, dtype=object), binary_data=False)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("score", "record")]
        result = client.infer("tiny", [tensor], outputs=outputs, parameters=OPTIONS)
        assert result.as_numpy("score").tolist() == want
        assert json.loads(result.as_numpy("record")[2])["score"] == want[2]
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([b"no image"], dtype=object))
    with pytest.raises(Exception, match="image 0: not an image"):
        client.infer("tiny", [tensor])
    client.close()


def test_the_other_family_is_served_as_well(pfd_engine: Path) -> None:
    picture = png(5, 60, 70)
    with load(pfd_engine) as scorer, running(Service({"pfd": scorer})) as site:
        options = diffiqa.Options(crops=2)
        expected = encode(Record.of(scorer.score(picture, options), RunSettings.of(scorer.manifest, options)))
        record = site.ask("POST", "/score?crops=2", picture).json
        assert timeless(record) == timeless(expected)
        assert refused(site.ask("POST", "/score?mode=tile", picture), 422, "restores no images")
        told = site.ask("POST", "/page/card?crops=2", picture).body.decode()
        assert '"card": ' in told
        assert set(record) <= set(
            site.ask("GET", "/openapi.json").json["components"]["schemas"]["Record"]["properties"]
        )


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_as_the_documents_show_it(site: Running, pictures: dict[str, bytes], expected: list[Any]) -> None:
    first, second, *_ = pictures

    def curl(*arguments: str) -> Any:
        return json.loads(subprocess.run(["curl", "-s", *arguments], capture_output=True, check=True).stdout)

    address = f"http://127.0.0.1:{site.port}/score?{QUERY}"
    assert curl("--data-binary", f"@{first}", address)["score"] == expected[0]["score"]
    both = curl("-F", f"image=@{first}", "-F", f"image=@{second}", address)
    assert [record["score"] for record in both] == [record["score"] for record in expected[:2]]
    chunked = curl("-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue", "-T", first, "-X", "POST", address)
    assert chunked["score"] == expected[0]["score"]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("crops=0", "between 1 and 10000"),
        ("crops=x", "whole number, not 'x'"),
        ("crops=200", "at most 144"),
        ("seeds=17", "at most 16"),
        ("mode=fine", "mode must be one of"),
        ("steps=99", "steps"),
        ("fast", "no fast sampling yet"),
        ("fast=maybe", "true or false"),
        ("pixel_budget=1000000", "at most 524288"),
        ("crop=4", "no option 'crop'; there are crops"),
        ("seed=1&seed=2", "'seed' is given twice"),
        ("format=xml", "json or jsonl"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_the_body_is_read(site: Running, query: str, says: str) -> None:
    assert refused(site.ask("POST", f"/score?{query}", b"no image at all"), 422, says)


def test_wrong_addresses_are_told_in_json(site: Running) -> None:
    assert refused(site.ask("POST", "/score?engine=big", b""), 404, "there is no engine 'big'; there are tiny")
    assert refused(site.ask("GET", "/v2/models/big"), 404, "'big'")
    assert refused(site.ask("GET", "/v2/models/tiny/versions/1"), 404, "version")
    assert refused(site.ask("GET", "/nothing"), 404, "openapi.json")
    assert refused(site.ask("GET", "/score"), 405, "takes POST")


def test_images_that_cannot_be_scored_say_why(site: Running) -> None:
    assert refused(site.ask("POST", "/score", b""), 422, "image 0: no bytes at all")
    assert refused(site.ask("POST", "/score?name=x.png", png(1)[:200]), 422, "x.png: damaged")
    # Looked at before it is decoded: the header says 9000 pixels a side, and few are behind it.
    header = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    bomb = png(1)[:12] + header + struct.pack(">I", zlib.crc32(header)) + png(1)[33:]
    assert refused(site.ask("POST", "/score", bomb), 422, "9000×9000 is more than 4000 pixels")
    assert refused(site.ask("POST", "/score", png(1, 60, 80)), 422, "more than 4000 pixels")


def test_bodies_beyond_the_limits_are_refused(site: Running) -> None:
    assert refused(site.ask("POST", "/score", b"x" * 200_001), 413, "200000 bytes")
    assert refused(site.ask("POST", "/score", iter([b"x" * 150_000] * 2)), 413)
    assert refused(site.ask("POST", "/score", b"x", {"Content-Encoding": "gzip"}), 415, "Content-Encoding")
    assert refused(site.ask("POST", "/score", *form({f"{n}": b"x" for n in range(1000)})), 413, "more than 8 files")
    tensor = {"name": "image", "datatype": "BYTES", "shape": [9], "data": []}
    assert refused(site.ask("POST", "/v2/models/tiny/infer", json.dumps({"inputs": [tensor]})), 413, "at most 8")
    until(lambda: site.service.gauges()["body_bytes"] == 0)


def test_broken_forms_are_refused(site: Running) -> None:
    body, headers = form({"a.png": b"x"})
    assert refused(site.ask("POST", "/score", body, {"Content-Type": "multipart/form-data"}), 400, "boundary")
    assert refused(site.ask("POST", "/score", body[:-8], headers), 400, "breaks off")
    assert refused(site.ask("POST", "/score", body.replace(b"form-data", b"thing"), headers), 400, "part 0")
    field = body.replace(b'name="image"; filename="a.png"', b'name="crops"')
    assert refused(site.ask("POST", "/score", field, headers), 422, "field 'crops' is not a file", "/score?seed=1")
    assert refused(site.ask("POST", "/score", *form({})), 422, "no files")


def test_three_hundred_malformed_bodies_get_an_answer_each_and_harm_nobody(
    site: Running, pictures: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    generator = random.Random(22)  # noqa: S311
    good_form, form_type = form({"a.png": png(1)})
    data = struct.pack("<I", 3) + b"abc"
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"id": "\ud800", "inputs": [tensor], "parameters": {"crops": 1}}).encode()
    values: list[Any] = [None, True, -1, 1.5, 10**30, "x", "\ud800", [], [[]], {}, {"a": {}}, float("nan")]

    def bent(value: Any) -> Any:
        if isinstance(value, dict) and value and generator.random() < 0.8:
            key = generator.choice(list(value))
            return {**value, key: bent(value[key])}
        if isinstance(value, list) and value and generator.random() < 0.8:
            return [bent(value[0]), *value[1:]]
        return generator.choice(values)

    def damaged(text: bytes) -> bytes:
        bad = bytearray(text)
        for _ in range(generator.randint(1, 8)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        return bytes(bad[: generator.randrange(len(bad))] if generator.random() < 0.3 else bad)

    answers = []
    with caplog.at_level(logging.WARNING):
        for number in range(300):
            if number % 3 == 0:
                answers.append(site.ask("POST", "/score?crops=1", damaged(good_form), form_type))
            elif number % 3 == 1:
                body = json.dumps(bent(json.loads(head))).encode()
                more = {"Inference-Header-Content-Length": generator.choice([str(len(body)), "-1", "9" * 20, "٣", ""])}
                where = f"/v2/models/{generator.choice(['tiny', '%ff', '..%2f'])}/infer"
                more = {key: text for key, text in more.items() if text.isascii()}
                answers.append(site.ask("POST", where, body + data, more))
            else:
                answers.append(site.ask("POST", "/score?crops=1", damaged(png(number))))
    assert {answer.status for answer in answers} <= {200, 400, 404, 413, 422}
    assert all("error" in answer.json for answer in answers if answer.status != 200)
    assert caplog.records == []
    assert site.ask("POST", "/score", png(1)).status == 200
    until(lambda: site.service.gauges() == {"queue_images": 0, "body_bytes": 0, "ready": True})


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,
    ],
    ids=["tls", "no-http", "negative", "two-lengths", "bad-chunk", "long-head"],
)
def test_what_is_not_http_is_told_in_json_and_ends_the_connection(site: Running, data: bytes) -> None:
    received = site.raw(data)
    assert received.startswith(b"HTTP/1.1 4")
    assert b'{"error": ' in received


def test_the_model_says_what_its_scores_mean_and_when_its_folder_has_changed(
    scorer: Scorer, tiny_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "engine"
    shutil.copytree(tiny_engine, path)
    with running(Service({"a": scorer}, directories={"a": path})) as site:
        assert refused(site.ask("GET", "/v2/health/ready"), 503, "not ready")
        site.service.warm_up()
        assert site.ask("GET", "/v2/health/ready").status == 200
        about = site.ask("GET", "/v2/models/a").json
        assert about["versions"] == [scorer.info.engine]
        assert about["parameters"]["meaning"] == scorer.info.score.meaning
        assert about["parameters"]["warning"] is None
        text = (path / MANIFEST).read_text()
        (path / MANIFEST).write_text(text.replace('"vcg_weight": 0.5', '"vcg_weight": 0.25'))
        other = read_manifest(path).engine_id
        assert other != scorer.info.engine
        assert f"has changed ({other})" in site.ask("GET", "/v2/models/a").json["parameters"]["warning"]
        (path / MANIFEST).unlink()
        assert "restart" in site.ask("GET", "/v2/models/a").json["parameters"]["warning"]
        assert site.ask("POST", "/score?crops=1", png(1)).json["engine"] == scorer.info.engine


def test_the_description_names_every_route_option_and_field(site: Running) -> None:
    about = site.ask("GET", "/openapi.json").json
    assert {"/score", "/v2/models/{name}/infer", "/metrics"} <= set(about["paths"])
    named = {parameter["name"] for parameter in about["paths"]["/score"]["post"]["parameters"]}
    assert named == {f.name for f in diffiqa.Options.__dataclass_fields__.values()} | {"engine", "format", "name"}
    (model,) = about["paths"]["/v2/models/{name}/infer"]["post"]["parameters"]
    assert model["schema"] == {"enum": ["tiny"]}
    record = site.ask("POST", "/score?crops=1", png(1)).json
    schema = about["components"]["schemas"]["Record"]["properties"]
    assert set(record) <= set(schema)
    kinds = {str: "string", int: "integer", float: "number", list: "array", type(None): "null"}
    assert all(kinds[type(value)] in schema[key]["type"] for key, value in record.items())


def test_counters_can_be_scraped_and_the_log_has_no_contents(site: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diffiqa.access"):
        site.ask("POST", "/score?crops=1&name=my-secret.png", png(1))
        text = site.ask("GET", "/metrics").body.decode()
    line = next(record.message for record in caplog.records if "/score" in record.message)
    about = json.loads(line)
    assert (about["path"], about["status"], about["images"], about["engine"]) == ("/score", 200, 1, "tiny")
    assert about["bytes"] == len(png(1))
    assert "secret" not in caplog.text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    count = int(lines['diffiqa_request_seconds_count{route="/score"}'])
    assert int(lines['diffiqa_request_seconds_bucket{route="/score",le="+Inf"}']) == count > 0
    assert float(lines["diffiqa_ready"]) == 1
