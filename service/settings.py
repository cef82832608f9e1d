"""Deployment settings: addresses, paths, limits and times, read from the environment (names below, prefix HSCR_).

The science is not here: that is hscr/config.py. Every process of a deployment reads the same variables.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

SECRET_VARIABLES = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "HSCR_")
    for name in (
        *("API_KEY", "WEBHOOK_SECRET", "UPSTREAM_KEY", "UID_KEY"),
        *("DATABASE_URL", "REDIS_URL", "ARTIFACTS_URL", "ARTIFACTS_OPTIONS"),
    )
) | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}


def without_secrets() -> dict[str, str]:
    """This process's environment for a child that has no business with what opens database, broker, store and API."""
    return {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES and not k.startswith("FSSPEC_")}


class Settings(BaseSettings):
    """All settings with their defaults. `DATABASE_URL` and `REDIS_URL` have no prefix, as is usual."""

    model_config = SettingsConfigDict(env_prefix="HSCR_", extra="ignore", populate_by_name=True)

    data_dir: Path = Path("hscr-data")
    database_url: str = Field(default="", validation_alias=AliasChoices("DATABASE_URL", "HSCR_DATABASE_URL"))
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", validation_alias=AliasChoices("REDIS_URL", "HSCR_REDIS_URL")
    )

    artifacts_url: str = (
        Field(  # where adapters, reports and data sets lie; empty = in the data folder (docs/storage.md)
            default="", repr=False, validation_alias=AliasChoices("ARTIFACTS_URL", "HSCR_ARTIFACTS_URL")
        )
    )
    artifacts_options: SecretStr | None = Field(  # JSON: what fsspec needs to open that address
        default=None, validation_alias=AliasChoices("ARTIFACTS_OPTIONS", "HSCR_ARTIFACTS_OPTIONS")
    )
    artifacts_cache_max_bytes: int = Field(default=50 * 2**30, ge=0)  # of what was read from such an address
    artifacts_wait_s: float = Field(default=600.0, ge=0)  # a job waits so long for a store that is away
    artifacts_grace_s: float = Field(default=3600.0, ge=0)  # objects without a row are removed when they are older
    log: Literal["auto", "json", "console"] = (
        "auto"  # JSON lines, or lines for people; auto: by whether stderr is a terminal
    )
    trace: Literal["auto", "on", "off"] = "auto"  # OpenTelemetry; auto: where OTEL_EXPORTER_OTLP_ENDPOINT is set

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: SecretStr | None = None

    model: str = ""  # Hugging Face name or folder; empty = the demo model that ships with hscr
    model_revision: str | None = None
    engine: Literal["local", "openai", "none"] = "local"
    upstream_url: str = ""  # engine openai: the model server's address (vLLM), http://HOST:PORT
    upstream_key: SecretStr | None = None
    upstream_model: str = ""  # its name there; empty = HSCR_MODEL
    upstream_data_dir: str = ""  # what the server calls the data folder, for adapters; empty = as it is called here
    upstream_adapters_max: int = Field(default=16, ge=1)  # adapters kept loaded there
    upstream_concurrency: int = Field(default=32, ge=1)  # questions with it at once; queue_max more wait
    upstream_timeout_s: float = Field(default=120.0, gt=0)
    upstream_check_s: float = Field(default=5.0, gt=0)  # between looks whether it is there
    device: str = "auto"
    dtype: str = "auto"
    # Jobs and engine on one device: both (a job's estimate must fit beside the engine), or one of them goes first.
    device_policy: Literal["share", "serve_first", "train_first"] = "share"
    device_name: str = (
        ""  # of one device for all who share the data folder; empty = by `device` and CUDA_VISIBLE_DEVICES
    )
    device_wait_s: float = Field(default=120.0, ge=0)  # a job waits so long for the engine to leave
    engine_threads: int = Field(default=1, ge=1)
    scheduling: Literal["continuous", "static"] = "continuous"  # do questions join others between decode steps
    batch_max: int = Field(default=16, ge=1)  # questions that are answered together
    batch_tokens_max: int = Field(default=32768, ge=1)  # their tokens, prompts and answers: bounds the key-value cache
    batch_window_s: float = Field(default=0.005, ge=0)
    queue_max: int = Field(default=64, ge=1)
    key_questions_max: int | None = Field(default=32, ge=1)  # of one key, waiting or being answered
    adapters_max_bytes: int = Field(default=2 * 2**30, ge=0)  # adapters kept loaded in the engine
    prefix_cache_max_bytes: int = Field(default=2**30, ge=0)  # keys and values of images asked about; 0 = none
    prefix_cache_per_key: bool = False  # callers do not share them: who asked about an image cannot be timed by others

    run_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "align"]
    evaluate_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "evaluate"]
    generate_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "generate"]
    plan_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "hscr", "plan"]
    plan_max_s: float = Field(default=180.0, gt=0)  # an estimate may take so long
    run_threads: int = Field(default=1, ge=1)
    feature_cache: str = (
        ""  # folder of image features, shared by runs and engine; empty = in the data folder, `off` = none
    )
    lease_s: float = Field(default=30.0, gt=0)
    stop_grace_s: float = Field(default=8.0, ge=0)  # a cancelled run gets this long after TERM, then KILL
    lock_wait_s: float = Field(default=60.0, ge=0)  # an attempt waits this long for an older one's run to be dead
    disk_reserve_bytes: int = Field(
        default=512 * 2**20, ge=0
    )  # with less free in the data folder no run starts or goes on
    max_crashes: int = Field(default=3, ge=1)
    sweep_interval_s: float = Field(default=1.0, gt=0)
    ring_after_s: float = Field(default=5.0, gt=0)
    share_generation: bool = True  # idle workers make parts of a running job's preferences
    share_worth: float = Field(default=4.0, gt=0)  # where what is left takes this many times as long as a run's start
    key_waiting_max: int | None = Field(
        default=1000, ge=0
    )  # jobs of one key that wait (queued, paused, awaiting review)
    key_running_max: int | None = Field(default=None, ge=1)  # jobs of one key that run at once

    keep_runs_s: float | None = Field(default=30 * 86400, ge=0)  # the folders of ended jobs; None: until deleted
    keep_idempotency_s: float = Field(default=7 * 86400, ge=0)
    clean_interval_s: float = Field(default=60.0, gt=0)

    webhook_hosts: Annotated[list[str], NoDecode] = []  # origins that may be called: https://host, http://host:port
    webhook_secret: SecretStr | None = None  # whsec_…; several with spaces between, while it is being changed
    webhook_timeout_s: float = Field(default=10.0, gt=0)
    webhook_pauses_s: list[float] = [
        5,
        30,
        120,
        600,
        1800,
        7200,
        21600,
        43200,
    ]  # after each failed attempt, then given up

    body_max_bytes: int = 32 * 2**20
    body_max_s: float = Field(default=120.0, gt=0)  # a body that is no upload comes within this time
    body_pause_max_s: float = Field(default=30.0, gt=0)  # any body: without a byte
    head_max_s: float = Field(default=20.0, gt=0)  # a request's line and headers come within this time
    connections_max: int | None = Field(default=512, ge=1)  # open at once; beyond it only probes are answered
    upload_max_bytes: int = 4 * 2**30
    upload_unpacked_max_bytes: int = 16 * 2**30
    adapter_max_bytes: int = Field(default=2 * 2**30, ge=1)  # of an uploaded adapter, unpacked
    upload_entries_max: int = 200_000
    record_rows_max: int = 500_000
    import_memory_max_bytes: int = Field(default=4 * 2**30, ge=2**28)  # of the process that reads a foreign layout
    decode_processes: int = Field(default=2, ge=1)  # that decode images, each with the limits below
    decode_memory_max_bytes: int = Field(default=2 * 2**30, ge=2**28)
    decoded_max_bytes: int = Field(default=2**30, ge=2**20)  # pixels of questions that wait or are answered
    decoded_recent_max_bytes: int = Field(
        default=128 * 2**20, ge=0
    )  # of them kept for the next question on the same file
    decode_max_s: float = Field(default=20.0, gt=0)
    uid_key: SecretStr | None = Field(
        default=None, min_length=16
    )  # remaps UIDs of uploaded DICOM files; None: a secret in the data folder
    import_max_s: float = Field(default=3600.0, gt=0)

    @field_validator("run_command", "evaluate_command", "generate_command", "plan_command", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A JSON list, or a command line as a shell would split it."""
        if isinstance(value, str):
            return json.loads(value) if value.lstrip().startswith("[") else shlex.split(value)
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
        """The model's name for people: a hub name as it is, of a folder only its last part (a path says too much)."""
        return "hscr-demo" if not self.model else Path(self.model).name if Path(self.model).exists() else self.model

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


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
