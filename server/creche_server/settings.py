"""The configuration: flags before environment before `creche.toml` before defaults."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from creche import Limits, Price, check_id
from creche_server.mcp.servers import McpSettings

CONFIG_FILE: Final = "creche.toml"
_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PREFIX: Final = "CRECHE_"  # of names in the environment


NonNegativeMoney = Annotated[Decimal, Field(ge=0)]  # USD; a TOML float is taken as it is written


class PriceSettings(BaseModel):
    """`[prices.MODEL]`: USD for a million tokens that the model reads, and that it writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: NonNegativeMoney
    output: NonNegativeMoney


class Settings(BaseSettings):
    """Each field is `CRECHE_FIELD` in the environment and `field` in creche.toml."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        toml_file=CONFIG_FILE,
        extra="forbid",
        frozen=True,
    )

    host: str = Field(default="127.0.0.1", description="the address to listen on")
    port: NonNegativeInt = Field(default=8000, le=65535, description="0 takes any that is free")
    data: Path = Field(
        default=Path(".creche"), description="keys, the address file, the SQLite database"
    )
    database: str | None = Field(
        default=None, description="a database URL; none is SQLite in `data`"
    )
    audit: Literal["file", "database"] = Field(
        default="file",
        description="keep the audit in `data`, or in the database",
    )
    model: str = Field(default="local", description="local, scripted or openai:NAME")
    model_attempts: PositiveInt = Field(
        default=3, description="how often an endpoint is asked, where its failure may pass"
    )
    mcp: McpSettings = Field(
        default_factory=McpSettings, description="MCP servers, whose tools agents may ask for"
    )
    user: str = Field(
        default="local", description="whom the printed link and `creche chat` speak for"
    )
    origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="origins of other pages that may connect"
    )
    operators: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="users who may see what runs of others do, without content"
    )
    log_level: str = Field(default="info", description="the least that is logged")
    otlp_endpoint: str | None = Field(
        default=None, description="base URL of the OpenTelemetry collector that spans go to"
    )

    shutdown_timeout: PositiveFloat = Field(default=10.0, description="seconds from signal to exit")
    max_connections: PositiveInt = Field(default=1000, description="open at once, of all kinds")
    max_connections_per_user: PositiveInt = Field(default=5, description="WebSockets of one user")

    run_timeout: PositiveFloat = Limits().run_timeout
    turn_timeout: PositiveFloat = Limits().turn_timeout
    first_token_timeout: PositiveFloat = Limits().first_token_timeout
    idle_timeout: PositiveFloat = Limits().idle_timeout
    tool_timeout: PositiveFloat = Limits().tool_timeout
    answer_timeout: PositiveFloat = Limits().answer_timeout
    approval_timeout: PositiveFloat = Limits().approval_timeout
    tool_source_timeout: PositiveFloat = Limits().tool_source_timeout
    cleanup_timeout: PositiveFloat = Limits().cleanup_timeout
    disconnect_grace: NonNegativeFloat = Field(
        default=10.0,
        description="seconds that a run with on_disconnect=cancel goes on with nobody watching",
    )
    runs_per_user: PositiveInt = Limits().runs_per_user
    runs_per_thread: PositiveInt = Limits().runs_per_thread
    running_per_user: PositiveInt = Limits().running_per_user
    running: PositiveInt = Limits().running
    tool_calls: NonNegativeInt = Limits().tool_calls
    tool_calls_per_minute: PositiveInt = Limits().tool_calls_per_minute
    run_tokens: NonNegativeInt | None = Field(
        default=None, description="read and written by models in one run; it ends past that"
    )
    run_usd: NonNegativeMoney | None = Field(default=None, description="the same in USD")
    tokens_per_user_per_day: NonNegativeInt | None = Field(
        default=None, description="of all runs of a user in a day, UTC"
    )
    usd_per_user_per_day: NonNegativeMoney | None = None
    tool_calls_per_user_per_day: NonNegativeInt | None = None
    prices: dict[str, PriceSettings] = Field(
        default_factory=dict, description="of models, by their names"
    )

    @field_validator("user")
    @classmethod
    def _can_be_a_user(cls, value: str) -> str:
        return check_id("user_id", value)

    @field_validator("log_level")
    @classmethod
    def _is_a_level(cls, value: str) -> str:
        if value.lower() not in _LOG_LEVELS:
            msg = f"use one of {', '.join(_LOG_LEVELS)}"
            raise ValueError(msg)
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_base_url(cls, value: str | None) -> str | None:
        """Without secrets, for it is logged; they go into OTEL_EXPORTER_OTLP_HEADERS."""
        if value is None:
            return None
        parts = urlsplit(value)
        is_plain = not ("@" in parts.netloc or parts.query or parts.fragment)
        is_http = parts.scheme in {"http", "https"} and parts.hostname
        if not (is_http and is_plain and parts.port != 0):  # `port` raises ValueError, too
            msg = "write it as http://collector:4318, without user, password or query"
            raise ValueError(msg)
        return value.rstrip("/").removesuffix("/v1/traces")

    @field_validator("operators")
    @classmethod
    def _can_be_users(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_id("user_id", each) for each in value)

    @field_validator("origins", "operators", mode="before")
    @classmethod
    def _in_a_row(cls, value: Any) -> Any:
        """The environment has one text for all of them, with commas."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("origins")
    @classmethod
    def _as_browsers_send_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_origin(text) for text in value)

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data / 'creche.db'}"

    @property
    def prices_by_model(self) -> dict[str, Price]:
        return {model: Price(price.input, price.output) for model, price in self.prices.items()}

    @property
    def limits(self) -> Limits:
        return dataclasses.replace(
            Limits(),
            run_timeout=self.run_timeout,
            turn_timeout=self.turn_timeout,
            first_token_timeout=self.first_token_timeout,
            idle_timeout=self.idle_timeout,
            tool_timeout=self.tool_timeout,
            answer_timeout=self.answer_timeout,
            approval_timeout=self.approval_timeout,
            tool_source_timeout=self.tool_source_timeout,
            cleanup_timeout=self.cleanup_timeout,
            runs_per_user=self.runs_per_user,
            runs_per_thread=self.runs_per_thread,
            running_per_user=self.running_per_user,
            running=self.running,
            tool_calls=self.tool_calls,
            tool_calls_per_minute=self.tool_calls_per_minute,
            run_tokens=self.run_tokens,
            run_usd=self.run_usd,
            tokens_per_user_per_day=self.tokens_per_user_per_day,
            usd_per_user_per_day=self.usd_per_user_per_day,
            tool_calls_per_user_per_day=self.tool_calls_per_user_per_day,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def _origin(text: str) -> str:
    """Scheme, host and port, as in an Origin header (RFC 6454 §6.2). Raises ValueError."""
    parts = urlsplit(text.lower().removesuffix("/"))
    if not (parts.scheme and parts.netloc) or parts.path or parts.query or parts.fragment:
        msg = f"{text!r} is no origin; write it as https://chat.example.com"
        raise ValueError(msg)
    return f"{parts.scheme}://{parts.netloc}"


def load_settings(**flags: Any) -> Settings:
    """The settings, with those flags on top that were given. Raises pydantic.ValidationError."""
    return Settings(**{name: value for name, value in flags.items() if value is not None})
