"""Names that the rules know: what makes mutable objects, what holds state, what caches.

All are the names by which things are imported, so an alias (`import functools as f`) changes
nothing.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final


def _names(text: str) -> frozenset[str]:
    """`module: name name` a line; each becomes `module.name`."""
    found: set[str] = set()
    for line in text.strip().splitlines():
        module, _, names = line.strip().partition(":")
        found.update(f"{module}.{name}" for name in names.split())
    return frozenset(found)


# Calls whose result can be changed in place.
MUTABLE: Final = _names(
    """
    builtins: bytearray dict list set sorted vars iter map filter zip enumerate reversed
    builtins.dict: fromkeys
    builtins.str: maketrans
    collections: ChainMap Counter OrderedDict UserDict UserList defaultdict deque
    array: array
    copy: copy deepcopy
    itertools: chain count cycle islice repeat
    json: load loads
    re: findall split
    tomllib: load loads
    types: SimpleNamespace
    weakref: WeakKeyDictionary WeakSet WeakValueDictionary
    os.environ: copy
    cachetools: Cache FIFOCache LFUCache LRUCache RRCache TLRUCache TTLCache
    """,
)
# Calls that freeze a container, though not what is in it.
FREEZING: Final = frozenset({"types.MappingProxyType", "builtins.tuple", "builtins.frozenset"})

MUTABLE_TYPES: Final = MUTABLE | _names(
    """
    typing: ChainMap Counter DefaultDict Deque Dict List MutableMapping MutableSequence MutableSet
    typing: OrderedDict Set TypedDict
    collections.abc: MutableMapping MutableSequence MutableSet
    """,
)

# Calls whose result holds state of its own, or a resource.
STATEFUL: Final = _names(
    """
    builtins: open
    io: BytesIO StringIO open TextIOWrapper
    asyncio: BoundedSemaphore Condition Event Future LifoQueue Lock PriorityQueue Queue Semaphore
    asyncio: TaskGroup get_event_loop new_event_loop
    anyio: CapacityLimiter Condition Event Lock Semaphore create_memory_object_stream
    anyio: create_task_group
    trio: CancelScope CapacityLimiter Condition Event Lock Semaphore StrictFIFOLock
    trio: open_memory_channel open_nursery
    trio.lowlevel: ParkingLot RunVar
    threading: Barrier BoundedSemaphore Condition Event Lock RLock Semaphore Thread Timer local
    queue: LifoQueue PriorityQueue Queue SimpleQueue
    multiprocessing: Event Lock Manager Pool Process Queue
    concurrent.futures: ProcessPoolExecutor ThreadPoolExecutor
    contextvars: Context copy_context
    random: Random
    sched: scheduler
    shelve: open
    socket: create_connection create_server socket
    subprocess: Popen
    tempfile: NamedTemporaryFile SpooledTemporaryFile TemporaryDirectory TemporaryFile
    http.client: HTTPConnection HTTPSConnection
    smtplib: SMTP SMTP_SSL
    sqlite3: connect
    httpx: AsyncClient Client
    httpx2: AsyncClient Client
    requests: Session session
    aiohttp: ClientSession
    urllib3: PoolManager ProxyManager
    psycopg: connect
    psycopg2: connect
    psycopg_pool: AsyncConnectionPool ConnectionPool
    pymongo: AsyncMongoClient MongoClient
    sqlalchemy: MetaData create_engine
    sqlalchemy.ext.asyncio: AsyncSession async_sessionmaker create_async_engine
    sqlalchemy.orm: Session declarative_base registry scoped_session sessionmaker
    redis: ConnectionPool Redis StrictRedis from_url
    redis.asyncio: ConnectionPool Redis from_url
    coredis: Redis RedisCluster
    boto3: Session client resource
    diskcache: Cache FanoutCache
    openai: AsyncAzureOpenAI AsyncOpenAI AzureOpenAI OpenAI
    anthropic: Anthropic AsyncAnthropic
    celery: Celery
    cyclopts: App
    typer: Typer
    fastapi: APIRouter FastAPI
    flask: Blueprint Flask
    quart: Blueprint Quart
    quart_trio: QuartTrio
    starlette.applications: Starlette
    """,
)
# How classes of libraries that are not in the table are called when they hold a resource.
STATEFUL_ENDINGS: Final = ("Client", "Connection", "ConnectionPool", "Session")

CACHES: Final = frozenset({"functools.cache", "functools.lru_cache"})
# Decorators of other libraries, by the last part of their name.
CACHE_NAMES: Final = frozenset(
    {
        *("alru_cache", "cache", "cache_data", "cache_resource", "cached", "cachedmethod"),
        *("lfu_cache", "lru_cache", "memoize", "memoized", "rr_cache", "ttl_cache"),
    },
)

# What a parameter, a variable or an attribute is called that says whose work this is.
IDENTITY: Final = frozenset(
    {
        *("user", "user_id", "userid", "current_user", "thread_id", "run_id", "request_id"),
        *("session_id", "tenant", "tenant_id", "account_id", "customer_id", "principal"),
        *("current_tenant", "current_run", "current_request", "user_context", "run_context"),
    },
)
# What else a cache must not be keyed by, or a function with a cache must not be handed.
IDENTITY_CARRIERS: Final = IDENTITY | {
    *("access_token", "auth", "context", "cookies", "credentials", "ctx", "identity", "request"),
    *("run", "session", "token", "websocket"),
}
# The words by which a ContextVar's name tells that an identity is in it.
IDENTITY_WORDS: Final = frozenset(
    {
        *("account", "auth", "context", "ctx", "customer", "identity", "principal", "request"),
        *("run", "session", "tenant", "thread", "token", "user"),
    },
)
# Types of ours and of web frameworks, by the last part of their name.
IDENTITY_TYPES: Final = frozenset(
    {
        *("HTTPConnection", "Request", "RequestId", "RunContext", "RunId", "ThreadId"),
        *("ToolContext", "UserExecutionContext", "UserId", "WebSocket"),
    },
)
# Annotations that say that a name is not what it looks like: `context: int` counts tokens.
NO_IDENTITY: Final = frozenset({"builtins.int", "builtins.float", "builtins.bool"})

# A framework's objects that stand for whatever request is current, and what of them says whose
# it is; empty: all of it.
PROXIES: Final = MappingProxyType(
    {
        "flask.g": frozenset[str](),
        "flask.request": frozenset({"authorization", "cookies", "headers"}),
        "flask.session": frozenset[str](),
        "flask_login.current_user": frozenset[str](),
        "quart.g": frozenset[str](),
        "quart.request": frozenset({"authorization", "cookies", "headers"}),
        "quart.session": frozenset[str](),
        "quart.websocket": frozenset({"authorization", "cookies", "headers"}),
        "quart_auth.current_user": frozenset[str](),
    },
)

# Functions that change something of the whole process.
PROCESS_CALLS: Final = _names(
    """
    asyncio: set_event_loop set_event_loop_policy
    codecs: register register_error
    importlib: reload
    os: chdir chroot fchdir nice putenv setgid setuid umask unsetenv
    os.environ: clear pop popitem setdefault update
    sys.meta_path: append clear extend insert pop remove
    sys.path: append clear extend insert pop remove reverse sort
    sys.path_hooks: append clear extend insert pop remove
    sys.modules: clear pop popitem setdefault update
    sys: addaudithook setprofile setrecursionlimit setswitchinterval settrace
    contextlib: chdir redirect_stderr redirect_stdout
    locale: setlocale
    multiprocessing: set_start_method
    numpy.random: seed
    random: seed setstate
    resource: setrlimit
    socket: setdefaulttimeout
    threading: setprofile settrace stack_size
    time: tzset
    torch: manual_seed
    """,
)
PROCESS_OBJECTS: Final = frozenset({"os.environ", "os.environb", "sys.modules", "sys.path"})
# What an entry point may choose for its process, and nobody later.
ENTRY_CALLS: Final = _names(
    """
    atexit: register
    faulthandler: disable enable
    gc: disable enable freeze set_debug set_threshold
    logging: basicConfig captureWarnings disable setLoggerClass setLogRecordFactory
    logging.config: dictConfig fileConfig
    signal: alarm set_wakeup_fd setitimer signal
    """,
)
WARNING_CALLS: Final = _names("warnings: filterwarnings resetwarnings simplefilter")

# Calls that start what no block waits for.
LOOSE_CALLS: Final = _names(
    """
    _thread: start_new_thread
    asyncio: create_task ensure_future run_coroutine_threadsafe
    trio.lowlevel: spawn_system_task start_thread_soon
    """,
)
THREADS: Final = frozenset(
    {"multiprocessing.Process", "threading.Thread", "threading.Timer"},
)
NURSERY_TYPES: Final = frozenset({"Nursery", "TaskGroup"})
NURSERY_NAMES: Final = frozenset({"nursery", "task_group", "taskgroup", "tg"})
SPAWNING: Final = frozenset({"create_task", "start", "start_soon"})
# Methods of an event loop that start what nothing waits for.
LOOP_CALLS: Final = frozenset(
    {"call_at", "call_later", "call_soon", "call_soon_threadsafe", "create_task"},
)

# Methods that change a container, and how many arguments a call of one has at least: with fewer
# it is another's, such as the `insert()` of a table.
CHANGING: Final = MappingProxyType(
    {
        "append": 1,
        "appendleft": 1,
        "discard": 1,
        "extend": 1,
        "extendleft": 1,
        "insert": 2,
        "popitem": 0,
        "setdefault": 1,
        "update": 1,
    },
)

SINGLETON_NAMES: Final = frozenset(
    {
        *("_instance", "__instance", "_instances", "__instances", "_singleton", "__singleton"),
        *("_shared_state", "__shared_state"),
    },
)

# Lists that Python or a library asks for by name, and nobody writes to.
ASKED_FOR: Final = frozenset(
    {
        *("__all__", "__match_args__", "__path__", "__slots__", "__table_args__"),
        *("__mapper_args__", "_fields_", "_ignore_"),
    },
)


def is_stateful(name: str) -> bool:
    """Whether a library's class is in the table, or is called as those in it are."""
    return name in STATEFUL or name.rpartition(".")[2].endswith(STATEFUL_ENDINGS)


def is_identity_name(name: str, names: frozenset[str] = IDENTITY) -> bool:
    """Whether a name says whose work this is: `user_id`, `_user_id`, `owner_user_id`."""
    plain = name.lstrip("_")
    return plain in names or plain.endswith(("_user_id", "_thread_id", "_run_id", "_tenant_id"))
