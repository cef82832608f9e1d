"""Deployment settings: addresses, paths, limits and times, read from the environment (names below, prefix HSCR_).

The science is not here: that is hscr/config.py. Every process of a deployment reads the same variables.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

SECRET_VARIABLES = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "HSCR_")
    for name in (
        *("API_KEY", "WEBHOOK_SECRET", "UPSTREAM_KEY", "UID_KEY", "DB_PASSWORD"),  # the last one is Compose's
        *("DATABASE_URL", "REDIS_URL", "ARTIFACTS_URL", "ARTIFACTS_OPTIONS"),
    )
) | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OTEL_EXPORTER_OTLP_HEADERS"}

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_QUOTED = re.compile(r"(['\"])(?:file://)?[~.]{0,2}/[^'\"]*/")  # a path's folders in a text; they may have blanks
_FOLDERS = re.compile(r"(?:file://|(?<![\w/]))[~.]{0,2}/(?!/)(?:[^\s/'\"]+/)*")  # an address keeps its own


def without_secrets() -> dict[str, str]:
    """This process's environment for a child that has no business with what opens database, broker, store and API."""
    return {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES and not k.startswith("FSSPEC_")}


class Settings(BaseSettings):
    """All settings with their defaults. `DATABASE_URL` and `REDIS_URL` have no prefix, as is usual.

    What each one is stands below it, and from here it comes into docs/settings.md (service/settings_page.py).
    """

    model_config = SettingsConfigDict(
        env_prefix="HSCR_", extra="ignore", populate_by_name=True, env_parse_none_str="null"
    )

    data_dir: Path = Path("hscr-data")
    """The data folder: SQLite, data sets, runs, artifacts, caches. All processes of one service share it."""
    database_url: str = Field(
        default="", repr=False, validation_alias=AliasChoices("DATABASE_URL", "HSCR_DATABASE_URL")
    )
    """postgresql://USER:PASSWORD@HOST:PORT/NAME; empty: a SQLite file in the data folder."""
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", repr=False, validation_alias=AliasChoices("REDIS_URL", "HSCR_REDIS_URL")
    )
    """The broker, Valkey or Redis. Only bells lie there; `hscr up` starts one of its own where this is not set."""
    artifacts_url: str = Field(
        default="", repr=False, validation_alias=AliasChoices("ARTIFACTS_URL", "HSCR_ARTIFACTS_URL")
    )
    """Where adapters, reports and data sets lie; empty: in the data folder ([storage.md](storage.md))."""
    artifacts_options: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("ARTIFACTS_OPTIONS", "HSCR_ARTIFACTS_OPTIONS")
    )
    """JSON: what fsspec needs to open that address."""
    artifacts_cache_max_bytes: int = Field(default=50 * 2**30, ge=0)
    """What is kept in the data folder of what was read from such an address."""
    artifacts_wait_s: float = Field(default=600.0, ge=0)
    """A job waits so long for a store that is away."""
    artifacts_grace_s: float = Field(default=3600.0, ge=0)
    """Objects without a row are removed when they are older."""
    feature_cache: str = ""
    """Folder of image features, shared by runs and engine; empty: in the data folder; `off`: none."""
    disk_reserve_bytes: int = Field(default=512 * 2**20, ge=0)
    """With less free in the data folder no run starts or goes on."""
    keep_runs_s: float | None = Field(default=30 * 86400, ge=0)
    """The folders of ended jobs are kept so long; `null`: until deleted."""
    keep_idempotency_s: float = Field(default=7 * 86400, ge=0)
    """Idempotency keys are kept so long."""
    clean_interval_s: float = Field(default=60.0, gt=0)
    """Between two looks at what may go."""

    host: str = "127.0.0.1"
    """The address to listen on. Any but loopback needs `HSCR_API_KEY`."""
    port: int = 8000
    """The port to listen on."""
    api_key: SecretStr | None = None
    """A key with every scope; `hscr keys create` makes others."""
    open_docs: bool = True
    """`/docs` and `/openapi.json` need no key: they hold no data."""
    key_waiting_max: int | None = Field(default=1000, ge=0)
    """Jobs of one key that wait (queued, paused, awaiting review)."""
    key_running_max: int | None = Field(default=None, ge=1)
    """Jobs of one key that run at once."""
    key_questions_max: int | None = Field(default=32, ge=1)
    """Questions of one key, waiting or being answered."""
    uid_key: SecretStr | None = Field(default=None, min_length=16)
    """Remaps UIDs of uploaded DICOM files; without one a secret in the data folder does ([data.md](data.md))."""
    log: Literal["auto", "json", "console"] = "auto"
    """JSON lines, or lines for people; `auto`: by whether stderr is a terminal."""
    trace: Literal["auto", "on", "off"] = "auto"
    """OpenTelemetry; `auto`: where `OTEL_EXPORTER_OTLP_ENDPOINT` is set ([observability.md](observability.md))."""

    model: str = ""
    """Hugging Face name or folder of the base model; empty: the demo model that ships with hscr."""
    model_revision: str | None = None
    """Revision of a Hugging Face name; pin it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …, of engine and runs."""
    dtype: str = "auto"
    """`auto` (bfloat16 on CUDA, float32 elsewhere), `float32`, `bfloat16`, `float16`."""
    engine: Literal["local", "openai", "none"] = "local"
    """What answers: the model in the API's process, another server (vLLM), nothing."""
    engine_threads: int = Field(default=1, ge=1)
    """Processor threads of the local engine."""
    device_policy: Literal["share", "serve_first", "train_first"] = "share"
    """Who has the one device: both, or jobs wait for the engine, or it leaves for them."""
    device_name: str = ""
    """One device for all who say the same name in one data folder; empty: by `HSCR_DEVICE` and `CUDA_VISIBLE_DEVICES`."""
    device_wait_s: float = Field(default=120.0, ge=0)
    """A job waits so long for the engine to leave."""

    upstream_url: str = ""
    """Engine `openai`: the model server's address, http://HOST:PORT ([serving.md](serving.md))."""
    upstream_key: SecretStr | None = None
    """Its key."""
    upstream_model: str = ""
    """The model's name there; empty: `HSCR_MODEL`."""
    upstream_data_dir: str = ""
    """What the server calls the data folder, for adapters; empty: as it is called here."""
    upstream_adapters_max: int = Field(default=16, ge=1)
    """Adapters kept loaded there."""
    upstream_concurrency: int = Field(default=32, ge=1)
    """Questions with it at once; `HSCR_QUEUE_MAX` more wait."""
    upstream_timeout_s: float = Field(default=120.0, gt=0)
    """For a whole answer."""
    upstream_check_s: float = Field(default=5.0, gt=0)
    """Between looks whether it is there."""

    scheduling: Literal["continuous", "static"] = "continuous"
    """Questions join others between decode steps, or whole batches follow each other."""
    batch_max: int = Field(default=16, ge=1)
    """Questions that are answered together."""
    batch_tokens_max: int = Field(default=32768, ge=1)
    """Their tokens, prompts and answers: bounds the key-value cache."""
    batch_window_s: float = Field(default=0.005, ge=0)
    """The first question of a batch waits so long for others."""
    queue_max: int = Field(default=64, ge=1)
    """Questions that wait; more are refused at once with Retry-After."""
    adapters_max_bytes: int = Field(default=2 * 2**30, ge=0)
    """Adapters kept loaded in the engine."""
    prefix_cache_max_bytes: int = Field(default=2**30, ge=0)
    """Keys and values of images asked about; 0: none."""
    prefix_cache_per_key: bool = False
    """Callers do not share them: who asked about an image cannot be timed by others."""

    run_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "align"]
    """What the worker runs for a job: a command line, or a JSON list."""
    evaluate_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "evaluate"]
    """The same for an evaluation."""
    generate_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "generate"]
    """The same for parts of another worker's generation."""
    plan_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "plan"]
    """The same for an estimate."""
    plan_max_s: float = Field(default=180.0, gt=0)
    """An estimate may take so long."""
    run_threads: int = Field(default=1, ge=1)
    """Processor threads of a run."""
    share_generation: bool = True
    """Idle workers make parts of a running job's preferences."""
    share_worth: float = Field(default=4.0, gt=0)
    """Where what is left takes this many times as long as a run's start."""
    lease_s: float = Field(default=30.0, gt=0)
    """A job whose worker says nothing for so long is given to another."""
    stop_grace_s: float = Field(default=8.0, ge=0)
    """A cancelled run gets so long after TERM, then KILL."""
    lock_wait_s: float = Field(default=60.0, ge=0)
    """An attempt waits so long for an older one's run to be dead."""
    max_crashes: int = Field(default=3, ge=1)
    """A job fails after so many crashes in a row without progress between them."""
    sweep_interval_s: float = Field(default=1.0, gt=0)
    """Between two rounds of the sweep."""
    ring_after_s: float = Field(default=5.0, gt=0)
    """A queued job's bell is rung again when nobody answered it for so long."""

    webhook_hosts: Annotated[list[str], NoDecode] = []
    """Origins that may be called, with commas or spaces between: https://host, http://host:port."""
    webhook_secret: SecretStr | None = None
    """`whsec_…`, which signs; several with spaces between, while it is being changed."""
    webhook_timeout_s: float = Field(default=10.0, gt=0)
    """For one attempt."""
    webhook_pauses_s: list[float] = [5, 30, 120, 600, 1800, 7200, 21600, 43200]
    """After each failed attempt, as a JSON list; then it is given up."""

    connections_max: int | None = Field(default=512, ge=1)
    """Open at once; beyond it only probes are answered."""
    head_max_s: float = Field(default=20.0, gt=0)
    """A request's line and headers come within this time."""
    body_max_bytes: int = 32 * 2**20
    """Of a body that is no upload."""
    body_max_s: float = Field(default=120.0, gt=0)
    """Such a body comes within this time."""
    body_pause_max_s: float = Field(default=30.0, gt=0)
    """Any body: without a byte."""
    upload_max_bytes: int = 4 * 2**30
    """Of an uploaded file."""
    upload_unpacked_max_bytes: int = 16 * 2**30
    """Of an uploaded data set, unpacked."""
    upload_entries_max: int = 200_000
    """Files in it."""
    record_rows_max: int = 500_000
    """Records in it."""
    adapter_max_bytes: int = Field(default=2 * 2**30, ge=1)
    """Of an uploaded adapter, unpacked."""
    import_memory_max_bytes: int = Field(default=4 * 2**30, ge=2**28)
    """Of the process that reads a foreign layout."""
    import_max_s: float = Field(default=3600.0, gt=0)
    """It may take so long."""
    decode_processes: int = Field(default=2, ge=1)
    """Processes that decode images, each with the limits below."""
    decode_memory_max_bytes: int = Field(default=2 * 2**30, ge=2**28)
    """Memory of each."""
    decode_max_s: float = Field(default=20.0, gt=0)
    """An image may take so long."""
    decoded_max_bytes: int = Field(default=2**30, ge=2**20)
    """Pixels of questions that wait or are answered."""
    decoded_recent_max_bytes: int = Field(default=128 * 2**20, ge=0)
    """Of them kept for the next question on the same file."""

    @field_validator("run_command", "evaluate_command", "generate_command", "plan_command", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A JSON list, or a command line as a shell would split it."""
        if isinstance(value, str):
            if not value.lstrip().startswith("["):
                return shlex.split(value)
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError("is no JSON list") from None
        return value

    @field_validator("webhook_hosts", mode="before")
    @classmethod
    def _origins(cls, value: Any) -> Any:
        """A list with commas or spaces between."""
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @property
    def database(self) -> str:
        """The database's address; a SQLite file in the data folder unless DATABASE_URL says otherwise."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'hscr.db').resolve()}"

    @property
    def features_folder(self) -> str:
        """Where image features are kept across runs, or `off`."""
        return self.feature_cache or str((self.data_dir / "cache" / "features").resolve())

    @property
    def model_path(self) -> str:
        return self.model or demo_model()

    @property
    def model_options(self) -> list[str]:
        """The model, its device and precision as the commands of `hscr` take them."""
        revision = ["--revision", self.model_revision] if self.model_revision else []
        return ["--model", self.model_path, *revision, "--device", self.device, "--dtype", self.dtype]

    @property
    def model_id(self) -> str:
        """The model's name for people: a hub name as it is, of a folder, there or not, only its last part (a path says too much)."""
        if not self.model:
            return "hscr-demo"
        hub = _HUB_NAME.fullmatch(self.model) and not Path(self.model).exists()
        # abspath and not resolve: a link keeps its own name, which stored versions have.
        return self.model if hub else Path(os.path.abspath(self.model)).name

    def shown(self, text: str) -> str:
        """A sentence about the model for callers: the model by its name for people, of any other folder the last part only."""
        own = sorted({self.model_path, str(Path(self.model_path).resolve())}, key=len, reverse=True)
        for path in own:
            if "/" in path:
                text = re.sub(rf"{re.escape(path)}(?![\w./-])", lambda _: self.model_id, text)
        return _FOLDERS.sub("", _QUOTED.sub(r"\1", text))

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


def variables() -> dict[str, str]:
    """The environment variable of each setting, by its field."""
    found = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        found[name] = str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"HSCR_{name.upper()}"
    return found


def read_settings(**given: Any) -> Settings:
    """The settings, given ones in the environment's place. ValueError: a line a wrong variable, without its value."""
    try:
        return Settings(**given)
    except ValidationError as error:
        names = variables()
        wrong = [
            (names.get(str(e["loc"][0]), e["loc"][0]), e["msg"].removeprefix("Value error, ")) for e in error.errors()
        ]
        raise ValueError("\n".join(f"{name}: {said[:1].lower()}{said[1:]}" for name, said in wrong)) from None
    except SettingsError as error:  # a list in JSON that is none; it quotes the field's name only
        name = re.search(r'field "(\w+)"', str(error))
        raise ValueError(f"{variables()[name[1]] if name else 'a setting'}: is not JSON") from None


def settings_or_exit() -> Settings:
    """For processes that are no command of `hscr`: a wrong variable ends them with its line and status 2."""
    try:
        return read_settings()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


@cache
def demo_model() -> str:
    import hscr

    return str(Path(next(iter(hscr.__path__))) / "demo" / "model")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
