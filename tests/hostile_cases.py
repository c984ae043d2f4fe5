"""Hostile and broken network files, made from scratch: what no network file may get away with.

`TRAPS` run code under Python's own unpickler: each of them then makes the file `trap_name`. `HOSTILE` are all the files
that must be refused, the traps among them; `GOOD` are two small networks that load. `content` has a file's bytes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import marshal
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from formats.network_files import MAX_HEADER, METADATA, _safetensors
from formats.pickle_reader import ACTIONS, MAX_INSTRUCTIONS, VALUES
from formats.pickle_writer import NetworkPickler
from test_network_files import Call, Persistent, as_edm, module_state, small

Builder = Callable[[], bytes]
State = dict[str, Any]

CHANNELS = 2  # of the good networks: the loader takes them, and example.py then says that it can't draw them
HEAD = b"\x80\x04"
MB = 1 << 20

# ---------------------------------------------------------------------------------------------------------------------
# Pickles, piece by piece


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def value(obj: Any) -> bytes:
    return pickle.dumps(obj, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    """GLOBAL: pushes what is found under this name."""
    return f"c{module}\n{attribute}\n".encode()


def path(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL: the same, but the attribute may be a path of attributes."""
    return text(module) + text(attribute) + b"\x93"


def call(module: str, attribute: str, *args: Any) -> bytes:
    """REDUCE: calls it."""
    return name(module, attribute) + value(args) + b"R"


def under(code: bytes, key: str = "ema") -> bytes:
    """A file with this under 'ema', or among the other entries."""
    return HEAD + b"}" + text(key) + code + b"s."


def calls(module: str, attribute: str, *args: Any) -> bytes:
    return under(call(module, attribute, *args))


TRAP = "TRAP-NNN"  # stands for the name of the file that a trap makes, which is as long
SPRING = f"open({TRAP!r}, 'w')"  # Python text that springs it


def content(build: bytes | Callable[[], bytes], index: int = 0) -> bytes:
    """The file, its trap with this number."""
    return (build if isinstance(build, bytes) else build()).replace(TRAP.encode(), trap_name(index).encode())


def trap_name(index: int) -> str:
    return f"TRAP-{index:03}"


META = {"type": "class", "version": 6, "module_src": "", "class_name": "EDMPrecond", "state": {}}
PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
ORDERED = ("collections", "OrderedDict")


# ---------------------------------------------------------------------------------------------------------------------
# Good networks, and how to spoil them


@cache
def network() -> Any:
    return small(img_channels=CHANNELS, model_channels=4, label_dim=0)


def entries() -> State:
    return {"loss_fn": {"class_name": "training.loss.EDMLoss"}, "dataset_kwargs": {"path": "x.zip"}, "sampling": None}


@cache
def good_pickle() -> bytes:
    buffer = io.BytesIO()
    NetworkPickler(buffer, half=False).dump({"ema": network(), **entries()})
    return buffer.getvalue()


@cache
def good_safetensors() -> bytes:
    return _safetensors(network(), entries(), half=False)


GOOD: dict[str, Callable[[], bytes]] = {"good.pkl": good_pickle, "good.safetensors": good_safetensors}


def spoiled(
    edit: Callable[[dict[str, State], State], Any], others: State | None = None, make: Callable[[], Any] = network
) -> Builder:
    """The good pickle after `edit(states, entries)`: the attributes of its modules by path, and its other entries.

    Its source text is a trap. make: another network than the usual one.
    """

    def build() -> bytes:
        rest = entries() | (others or {})
        return pickle.dumps({"ema": as_edm(make(), SPRING, lambda states: edit(states, rest)), **rest}, 4)

    return build


def with_kwargs(**changes: Any) -> Builder:
    own = {k: v for k, v in changes.items() if k in ("img_resolution", "img_channels", "label_dim")}

    def edit(states: dict[str, State], rest: State) -> None:
        states[""] |= own
        states[""]["_init_kwargs"] = {**states[""]["_init_kwargs"], **changes}

    return spoiled(edit)


def with_entry(**others: Any) -> Builder:
    return spoiled(lambda states, rest: None, others)


def with_attribute(where: str, **changes: Any) -> Builder:
    return spoiled(lambda states, rest: states[where].update(changes))


def with_parameter(where: str, leaf: str, make: Callable[[], torch.Tensor]) -> Builder:
    def edit(states: dict[str, State], rest: State) -> None:
        states[f"model.{where}"]["_parameters"][leaf] = nn.Parameter(make())

    return spoiled(edit)


def as_type(dtype: torch.dtype, **others: Any) -> Builder:
    def edit(states: dict[str, State], rest: State) -> None:
        for state in states.values():
            for table in ("_parameters", "_buffers"):
                state[table] = {name: t if t is None else t.detach().to(dtype) for name, t in state[table].items()}

    return spoiled(edit, others)


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


def laughs(levels: int, inner: Any = "ha") -> Any:
    for _ in range(levels):
        inner = [inner] * 10
    return inner


def sampling(**changes: Any) -> State:
    return {"levels": [80.0, 1.0, 0.0], "solver": "euler", "ratio": 2, "lineage": [], **changes}


def bare(state: State, class_name: str = "EDMPrecond") -> Persistent:
    return Persistent(class_name, module_state({"_init_args": (), "_init_kwargs": {}, **state}), "")


def tower(levels: int, width: int) -> bytes:
    module = bare({"_modules": {}}, "UNetBlock")
    for _ in range(levels):
        module = bare({"_modules": {f"m{i}": module for i in range(width)}}, "UNetBlock")
    return pickle.dumps({"ema": module}, 4)


def student(num_steps: Any, ratio: Any) -> Persistent:
    return Persistent("EDMDistillationLoss", {"num_steps": num_steps, "ratio": ratio}, "")


@cache
def coarse() -> Any:
    return small("iDDPMPrecond", img_channels=CHANNELS, model_channels=4, label_dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors


def header_of(data: bytes) -> State:
    header: State = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def safe(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    start = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(start) if length is None else length) + start + body


def lying(edit: Callable[[State], Any]) -> Builder:
    """The good safetensors file after `edit(header)`."""

    def build() -> bytes:
        good = good_safetensors()
        header = header_of(good)
        edit(header)
        return safe(header, good[8 + int.from_bytes(good[:8], "little") :])

    return build


FIRST = "model.map_layer0.bias"


def lying_tensor(**changes: Any) -> Builder:
    return lying(lambda header: header[FIRST].update(changes))


def lying_network(edit: Callable[[State], Any]) -> Builder:
    def apply(header: State) -> None:
        meta = json.loads(header["__metadata__"][METADATA])
        edit(meta)
        header["__metadata__"][METADATA] = json.dumps(meta)

    return lying(apply)


def metadata(value: str) -> Builder:
    return lying(lambda header: header["__metadata__"].update({METADATA: value}))


def extra_tensor(dtype: str, shape: list[int]) -> Builder:
    return lying(lambda header: header.update({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}))


def lying_length(change: int) -> bytes:
    good = good_safetensors()
    return struct.pack("<Q", int.from_bytes(good[:8], "little") + change) + good[8:]


def padded_header(size: int) -> bytes:
    good = good_safetensors()
    end = 8 + int.from_bytes(good[:8], "little")
    return safe(good[8:end] + b" " * size, good[end:])


def empty_tensors(count: int) -> bytes:
    tensors = (f'"{i:06}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return safe(("{" + ",".join(tensors) + "}").encode())


def retyped(dtype: str, size: int) -> bytes:
    header, end = {"__metadata__": header_of(good_safetensors())["__metadata__"]}, 0
    for key, tensor in network().state_dict().items():
        start, end = end, end + size * tensor.numel()
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return safe(header, bytes(end))


# ---------------------------------------------------------------------------------------------------------------------
# Traps: calls that Python's own unpickler makes


def run_text() -> bytes:
    return pickle.dumps(Call(eval, SPRING), 2)


def calling(function: bytes, *args: bytes) -> bytes:
    """Instructions that call what instructions push, with arguments that instructions push."""
    return function + b"(" + b"".join(args) + b"tR"


def code_object() -> bytes:
    return calling(name("marshal", "loads"), raw(marshal.dumps(compile(SPRING, "trap", "exec"))))


def object_array() -> bytes:
    buffer = io.BytesIO()
    array = np.empty(1, dtype=object)
    array[0] = Call(eval, SPRING)
    np.save(buffer, array)
    return buffer.getvalue()


IMPORT = name("importlib", "import_module")
GETATTR = name("builtins", "getattr")
MKDIR = name("os", "mkdir")

TRAPS_CODE: dict[str, bytes] = {  # under 'ema'
    "subprocess.check_call": call("subprocess", "check_call", ["touch", TRAP]),
    "pty.spawn": call("pty", "spawn", ["touch", TRAP]),
    # Python text and code
    "builtins.exec": call("builtins", "exec", SPRING),
    "builtins.eval": call("builtins", "eval", SPRING),
    "runpy": call("runpy", "_run_code", SPRING, {}),
    "timeit.timeit": call("timeit", "timeit", "pass", SPRING),
    "cProfile.run": call("cProfile", "run", SPRING),
    "marshal.loads": calling(name("builtins", "exec"), code_object(), value({})),
    "types.FunctionType": calling(
        calling(
            name("types", "FunctionType"),
            code_object(),
            b"}" + text("__builtins__") + calling(IMPORT, text("builtins")) + b"s",
        )
    ),
    "pickle.loads": calling(name("pickle", "loads"), raw(run_text())),
    "_pickle.loads": calling(name("_pickle", "loads"), raw(run_text())),
    "pickle in pickle in pickle": calling(
        name("pickle", "loads"), raw(HEAD + calling(name("pickle", "loads"), raw(run_text())) + b".")
    ),
    "pathlib.Path.touch": calling(path("pathlib", "Path.touch"), call("pathlib", "Path", TRAP)),
    "pathlib.Path.write_text": calling(path("pathlib", "Path.write_text"), call("pathlib", "Path", TRAP), text("x")),
    # detours
    "operator.methodcaller": calling(call("operator", "methodcaller", "mkdir", TRAP), calling(IMPORT, text("os"))),
    "operator.attrgetter": calling(
        calling(call("operator", "attrgetter", "mkdir"), calling(IMPORT, text("os"))), text(TRAP)
    ),
    "builtins.getattr": calling(calling(GETATTR, calling(IMPORT, text("os")), text("mkdir")), text(TRAP)),
    "builtins.__import__": calling(calling(GETATTR, call("builtins", "__import__", "os"), text("mkdir")), text(TRAP)),
    "functools.partial": calling(calling(name("functools", "partial"), MKDIR, text(TRAP))),
    "functools.reduce": calling(name("functools", "reduce"), name("os", "open"), value([TRAP, 0o101])),
    "builtins.map": calling(name("builtins", "list"), calling(name("builtins", "map"), MKDIR, value([TRAP]))),
    # what this project depends on, and what it is made of
    "torch.save": call("torch", "save", 1, TRAP),
    "torch.storage": calling(name("torch.storage", "_load_from_bytes"), raw(run_text())),
    "numpy.savetxt": call("numpy", "savetxt", TRAP, [1]),
    "numpy.memmap": call("numpy", "memmap", TRAP, "uint8", "w+", 0, 1),
    "numpy.load": calling(name("numpy", "load"), calling(name("_io", "BytesIO"), raw(object_array())), b"N", b"\x88"),
    "this project's exec": call("formats.network_code", "_run_and_reconstruct", {**META, "module_src": SPRING}),
    # paths of attributes that begin at modules and functions with names on the list
    "dnnlib.util.os.mkdir": calling(path("dnnlib.util", "os.mkdir"), text(TRAP)),
    "torch.hub.os.mkdir": calling(path("torch", "hub.os.mkdir"), text(TRAP)),
    "torch._utils.sys.modules": calling(
        calling(GETATTR, calling(path("torch._utils", "sys.modules.get"), text("os")), text("mkdir")), text(TRAP)
    ),
    "_rebuild_parameter.__builtins__": calling(
        calling(path("torch._utils", "_rebuild_parameter.__builtins__.get"), text("exec")), text(SPRING)
    ),
    # instructions
    "INST": b"(" + text(TRAP) + b"ios\nmkdir\n",
    "OBJ": b"(" + name("logging", "FileHandler") + text(TRAP) + b"o",
    "NEWOBJ": name("numpy", "memmap") + value((TRAP, "uint8", "w+", 0, 1)) + b"\x81",
    "NEWOBJ_EX": name("numpy", "memmap") + value((TRAP,)) + value({"mode": "w+", "shape": 1}) + b"\x92",
    "STACK_GLOBAL": calling(path("os", "mkdir"), text(TRAP)),
    "BUILD": calling(
        calling(name("functools", "partial"), name("builtins", "print")) + b"(" + MKDIR + value((TRAP,)) + b"}}tb"
    ),
    "in a set": b"\x8f(" + call("os", "mkdir", TRAP) + b"\x90",
}
TRAPS: dict[str, bytes | Builder] = {
    **{key: under(code) for key, code in TRAPS_CODE.items()},
    # programs
    "os.system": calls("os", "system", "touch TRAP-NNN"),
    "posix.system": calls("posix", "system", "touch TRAP-NNN"),
    "os.spawnlp": calls("os", "spawnlp", 0, "touch", "touch", TRAP),
    "subprocess.getoutput": calls("subprocess", "getoutput", "touch TRAP-NNN"),
    "__builtin__.eval": b"\x80\x02" + call("__builtin__", "eval", SPRING) + b".",
    # files
    "builtins.open": calls("builtins", "open", TRAP, "w"),
    "io.open": calls("io", "open", TRAP, "x"),
    "codecs.open": calls("codecs", "open", TRAP, "w"),
    "os.open": calls("os", "open", TRAP, 0o101),
    "os.mkdir": calls("os", "mkdir", TRAP),
    "os.symlink": calls("os", "symlink", "/", TRAP),
    "gzip.open": calls("gzip", "open", TRAP, "w"),
    "zipfile.ZipFile": calls("zipfile", "ZipFile", TRAP, "w"),
    "sqlite3.connect": calls("sqlite3", "connect", TRAP),
    "logging.FileHandler": calls("logging", "FileHandler", TRAP),
    "shutil.copy": calls("shutil", "copy", "/dev/null", TRAP),
    "dnnlib.atomic": calls("dnnlib.atomic", "write_text", TRAP, "x"),
    # places
    "in another entry": under(call("os", "mkdir", TRAP), "loss_fn"),
    "as a key": HEAD + b"}" + call("os", "mkdir", TRAP) + text("x") + b"s.",
    "before the network": lambda: HEAD + call("os", "mkdir", TRAP) + b"0" + good_pickle()[2:],
    "through the memo": HEAD + MKDIR + b"q\x05" + calling(b"h\x05", text(TRAP)) + b"\x86.",
    "as an attribute": with_attribute("model", x=Call(eval, SPRING)),
    "as a constructor argument": with_kwargs(dropout=Call(eval, SPRING)),
    "instead of a tensor": with_attribute("model.map_layer0", _parameters={"weight": Call(eval, SPRING)}),
    "instead of a module": with_attribute("model", _modules={"enc": Call(eval, SPRING)}),
    "instead of a module's attributes": pickle.dumps({"ema": Persistent("EDMPrecond", Call(eval, SPRING), "")}, 4),
    "instead of a class name": pickle.dumps({"ema": Persistent(Call(eval, SPRING), {}, "")}, 4),
}

# ---------------------------------------------------------------------------------------------------------------------
# Everything else that must be refused

NAMES = """
    os.execv os.fork os._exit os.kill os.remove os.rename os:environ.update os.putenv os.chmod os.listdir
    subprocess.Popen subprocess.run asyncio.create_subprocess_shell multiprocessing.Process threading.Thread
    shutil.rmtree tempfile.mkdtemp pathlib.PosixPath pathlib.Path pathlib:Path.home pathlib:Path.unlink
    socket.socket socket.create_connection urllib.request.urlopen http.client.HTTPConnection requests.get
    ftplib.FTP smtplib.SMTP webbrowser.open ctypes.CDLL ctypes.string_at mmap.mmap
    importlib.import_module importlib.reload importlib.machinery.SourceFileLoader pkgutil.get_data site.addsitedir
    zipimport.zipimporter pip.main code.interact pdb.set_trace antigravity.geohash this.s
    builtins.breakpoint builtins.compile builtins.input builtins.globals builtins.setattr builtins.type builtins.object
    builtins.super builtins.print builtins.memoryview builtins.bytearray builtins.dict builtins.list builtins.range
    sys.exit sys.settrace sys.addaudithook sys.modules gc.get_objects signal.raise_signal atexit.register
    codecs.encode codecs.decode codecs.lookup codecs.StreamReaderWriter _codecs.decode _codecs.lookup _codecs.register
    copyreg._reconstructor copyreg.__newobj__ copyreg.add_extension copy.deepcopy types.CodeType weakref.finalize
    torch.load torch.hub.load torch.hub.download_url_to_file torch.hub.load_state_dict_from_url torch.jit.load
    torch.serialization.load torch.package.PackageImporter torch.ops.load_library torch.classes.load_library
    torch.utils.cpp_extension.load_inline torch.distributed.init_process_group torch.compile torch.from_file
    torch.FloatStorage torch.FloatTensor torch._utils._rebuild_tensor torch._utils._rebuild_device_tensor_from_numpy
    torch._utils._rebuild_wrapper_subclass torch._tensor._rebuild_from_type_v2 torch.storage:UntypedStorage.from_file
    torch.nn.modules.container.Sequential torch.nn.Linear torch.nn.modules.container:ModuleDict.forward
    numpy.load numpy.fromfile numpy.loadtxt numpy.genfromtxt numpy.lib.npyio.NpzFile numpy.ctypeslib.load_library
    numpy.ndarray numpy.core.multiarray._reconstruct numpy.core.multiarray.fromfile numpy._core.multiarray.frombuffer
    numpy.random._pickle.__generator_ctor numpy:dtype.newbyteorder numpy.float64
    collections:OrderedDict.fromkeys collections:OrderedDict.__class__ collections.defaultdict collections.namedtuple
    dnnlib.util.open_url dnnlib.util:EasyDict.__class__ dnnlib:EasyDict.__init__ dnnlib:util.EasyDict
    torch_utils.persistence.import_hook torch_utils.persistence.persistent_class torch_utils.persistence._hooks
    torch_utils.persistence:_reconstruct_persistent_obj.__globals__ formats.network_files.load_network
    training.networks.EDMPrecond formats.state.load_state example.main generate.main
""".split()  # noqa: SIM905 (a list of them would fill a page)


def storage(data: bytes, count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """What torch stores of a tensor's elements, with a count of its own."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    head = b"\x80\x02(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + value(count) + b"NtQ."
    listed = [pickle.dumps(part, 2) for part in parts] + [head, pickle.dumps([key], 2)]
    return b"".join(listed) + struct.pack("<Q", count % (1 << 64)) + data


def tensor(inner: bytes, offset: int, shape: Any, stride: Any) -> bytes:
    stored = calling(name("torch.storage", "_load_from_bytes"), raw(inner))
    ordered = call("collections", "OrderedDict")
    args = [stored, value(offset), value(shape), value(stride), b"\x89", ordered]
    return under(calling(name("torch._utils", "_rebuild_tensor_v2"), *args))


def zipped(count: int, size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(count):
            archive.writestr(f"archive/data/{index}", bytes(size))
    return buffer.getvalue()


def saved(obj: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **options)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    return buffer.getvalue()


def crowd(count: int, leaf: State, key: str = "") -> bytes:
    """A network of so many modules that are one; under a key of their own, where there is one."""
    module = bare(leaf, "GroupNorm")
    whole = bare({"_modules": {f"{i}": module for i in range(count)}}, "UNetBlock" if key else "EDMPrecond")
    return pickle.dumps({"ema": bare({"_modules": {key: whole}}) if key else whole}, 4)


def many_entries(count: int, value: Any) -> Builder:
    return with_entry(**{f"e{i}": value for i in range(count)})


def as_much_as_may_be() -> bytes:
    """The good network with entries that use up what instructions and plain values there are, and a useless grid."""
    good = with_entry(sampling=7)()
    lists = text("0") + b"](" + b"]" * 199_000 + b"eq\xf0s" + b"".join(text(f"{i}") + b"h\xf0s" for i in (1, 2))
    return good[:-1] + lists + text("sets") + b"](" + b"\x8f" * 250_000 + b"es."


def many_copies(code: bytes, count: int, items: bytes, times: int) -> bytes:
    """The same call on the same list, again and again, in a file that is large enough to be allowed something."""
    start = HEAD + b"]" + code + b"q\x00a](" + items + b"e\x85q\x01a" + raw(bytes(8 * MB)) + b"a"
    return start + b"h\x00h\x01Ra" * times + b"."


def many_blocks(num_blocks: int) -> bytes:
    """A network of 3558 parts that are the same few, which asks for so many blocks at each of 14 resolutions."""
    kwargs = network().init_kwargs | {"num_blocks": num_blocks, "channel_mult": [1] * 14, "img_resolution": 1 << 14}
    parts: Any = bare({"_parameters": {"weight": nn.Parameter(torch.zeros(100))}}, "UNetBlock")
    for width in (10, 10, 8, 4):
        parts = bare({"_modules": {f"{i}": parts for i in range(width)}}, "UNetBlock")
    return pickle.dumps({"ema": bare({"_modules": {"model": parts}, "_init_kwargs": kwargs}), "x": bytes(4 * MB)}, 4)


def endless() -> Any:
    module = nn.ModuleDict()
    module._modules["x"] = module
    return module


def own_part() -> bytes:
    meta = value({**META, "state": None, "class_name": "UNetBlock"}) + text("state") + b"}q\xf5s"
    module = text("ema") + name(*PERSISTENT) + meta + b"\x85Rq\xf6s"
    return HEAD + b"}" + module + text("x") + b"h\xf5" + text("_modules") + b"}" + text("x") + b"h\xf6sss."


def itself(kind: str) -> bytes:
    begin, add = {"list": (b"]", b"a"), "dict": (b"}" + text("x"), b"s"), "tuple": (b"]", b"\x85a")}[kind]
    return under(begin[:1] + b"q\x00" + begin[1:] + b"h\x00" + add)


def calls_dotted(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(":" if ":" in dotted else ".")
    return under(calling(path(module, attribute), text("x")))


def misused(module: str, attribute: str, *args: bytes) -> bytes:
    """A call of something on the list, with arguments that it never has."""
    return under(calling(name(module, attribute), *args))


INSTRUCTIONS = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes if op.name not in {*VALUES, *ACTIONS}}

CALLS_CODE: dict[str, bytes] = {  # under 'ema'
    "an empty name": path("", ""),
    "an empty module": path("", "set"),
    "a name with a zero": path("collections", "OrderedDict\0"),
    "a name of look-alikes": path("соllections", "OrderedDict"),
    "a name in capitals": path("COLLECTIONS", "ORDEREDDICT"),
    "a name with a line feed": path("os\nsystem", "x\nerror: y"),
    "a name that clears the screen": path("\x1b[2J\x1b]0;x\x07", "\x9b2J\u202e"),
    "a name of a lone surrogate": path("\udc80", "\ud800"),
    "a name of a megabyte": path("x" * MB, "y"),
    "a name that is a number": value(3) + value(4) + b"\x93",
    "a name that is a call": call("builtins", "set") + text("x") + b"\x93",
    "a name with a carriage return": b"ccollections\r\nOrderedDict\r\n",
    "a name that is no UTF-8": b"c\xff\xfe\nx\n",
    "calls a text": calling(text("os.system"), text("x")),
    "calls a list": calling(value([1]), text("x")),
    "calls the result of a call": calling(call("builtins", "set"), text("x")),
    "calls with a list": name(*ORDERED) + value([1]) + b"R",
    "calls a mark": b"((R",
    "attributes for a function": name("dnnlib", "EasyDict") + value({"__getattr__": 1}) + b"b",
    "attributes for a class": name("numpy", "dtype") + b"N" + value({"x": 1}) + b"\x86b",
    "attributes for a list": value([]) + value({"x": 1}) + b"b",
    "attributes for a tuple": value(()) + value({"__class__": 1}) + b"b",
    "attributes for a persistent object": call(*PERSISTENT, META) + value({"x": 1}) + b"b",
    "attributes that are no dict": name("torch.nn.modules.container", "ModuleDict") + b")\x81" + value([1]) + b"b",
    "a scalar object": calling(name("numpy.core.multiarray", "scalar"), call("numpy", "dtype", "O8"), text("x")),
    "a scalar of the wrong size": calling(
        name("numpy.core.multiarray", "scalar"), call("numpy", "dtype", "f8"), raw(b"1234")
    ),
    "a network that is a ModuleDict": name("torch.nn.modules.container", "ModuleDict") + b")\x81",
    "a persistent id": value(("storage", 1)) + b"Q",
}
CALLS: dict[str, bytes | Builder] = {
    **{key: under(code) for key, code in CALLS_CODE.items()},
    **{f"calls {dotted}": calls_dotted(dotted) for dotted in NAMES},
    "a name without end": HEAD + b"c" + b"x" * 1000,
    "a data type of objects": misused("numpy", "dtype", text("O8"), b"\x89", b"\x88"),
    "a structured data type": misused("numpy", "dtype", value([("x", "O")])),
    "a byte string in rot13": misused("_codecs", "encode", text("os"), text("rot13")),
    "a byte string in zip": misused("_codecs", "encode", text("os"), text("zlib_codec")),
    "a byte string in no codec": misused("_codecs", "encode", text("os"), text("../../trap")),
    "a byte string of large letters": misused("_codecs", "encode", text("\u0416"), text("latin1")),
    "a byte string of a number": misused("builtins", "bytes", value(1 << 40)),
    "a dict of a text": misused(*ORDERED, text("ab")),
    "a dict of odd pairs": misused(*ORDERED, value([[1, 2, 3]])),
    "a dict with lists for keys": misused(*ORDERED, value([[[], 1]])),
    "a set of lists": misused("builtins", "set", value([[]])),
    "a set of a number": misused("builtins", "set", value(1 << 40)),
    "a parameter of a text": misused("torch._utils", "_rebuild_parameter", text("x"), b"\x89", b"}"),
    "a tensor of a text": misused("torch._utils", "_rebuild_tensor_v2", text("x"), value(0), b"))\x89}"),
    "a storage of a text": misused("torch.storage", "_load_from_bytes", text("x")),
    "a module with arguments": misused("torch.nn.modules.container", "ModuleDict", value({"x": 1})),
    "a persistent function": misused(*PERSISTENT, value({**META, "type": "function"})),
    "a persistent object of no version": misused(*PERSISTENT, value({**META, "version": None})),
    "a persistent object of a list's version": misused(*PERSISTENT, value({**META, "version": [6]})),
    "a persistent object without text": misused(*PERSISTENT, value({"type": "class", "version": 6})),
    "a persistent object of no name": misused(*PERSISTENT, value({**META, "class_name": 5})),
    "a persistent object of a path": misused(*PERSISTENT, value({**META, "class_name": "EDMPrecond.__init__"})),
    "a persistent object of os.system": misused(*PERSISTENT, value({**META, "class_name": "os.system"})),
    "a persistent object of a foreign class": misused(*PERSISTENT, value({**META, "class_name": "Wonder"})),
    "a persistent object of nothing": misused(*PERSISTENT, value(META)),
    "a network that is a layer": misused(*PERSISTENT, value({**META, "class_name": "Conv2d"})),
    **{f"instruction {key}": HEAD + value([1, 2]) * 3 + op + b"1\n1\n1\n." for key, op in INSTRUCTIONS.items()},
    "an unknown instruction": HEAD + b"\xff.",
}

MEMO_CODE: dict[str, bytes] = {  # under 'ema'
    "refers to nothing": b"h\xff",
    "refers to the far end": b"j\xff\xff\xff\xff",
    "laughing version": calling(name(*PERSISTENT), value({**META, "version": laughs(9)})),
    "laughter where modules belong": calling(name(*PERSISTENT), value({**META, "state": {"_modules": laughs(9)}})),
    "a deep network": b"]" * 100_000 + b"a" * 99_999,
    "a deep version": name(*PERSISTENT)
    + value({**META, "version": 0})
    + text("version")
    + b")"
    + b"\x85" * 100_000
    + b"s\x85R",
    "deep arguments": calling(name(*PERSISTENT), value({**META, "state": {"_init_kwargs": {"x": nested(300)}}})),
}
MEMO: dict[str, bytes | Builder] = {
    **{key: under(code) for key, code in MEMO_CODE.items()},
    "remembers a mark": HEAD + b"(\x94.",
    "remembers nothing": HEAD + b"q\x00.",
    "appends to a mark": HEAD + b"(Na.",
    "appends to a tuple": HEAD + b")Na.",
    "a list of itself": itself("list"),
    "a dict of itself": itself("dict"),
    "a tuple of itself": itself("tuple"),
    "nothing but marks": HEAD + b"(" * 100_000 + b".",
    "nothing but the end": HEAD + b"." * 1000,
    "a network of itself": own_part(),
    "modules without end": spoiled(lambda states, rest: states["model"].update(_modules={"x": endless()})),
    "a tower of modules": tower(40, 1),
    "a billion modules": tower(9, 10),
    "a hundred thousand modules": tower(5, 10),
    "many modules under a long name": crowd(3000, {}, "x" * MB),
    "a few under a long name": crowd(9, {}, "x" * 10_000),
    "many modules with the same tensors": crowd(
        5000, {"_parameters": dict.fromkeys(map(str, range(5000)), nn.Parameter(torch.zeros(1)))}
    ),
    "many modules with the same numbers": crowd(5000, {f"a{i}": 1 for i in range(5000)}),
    "laughing lists": pickle.dumps({"ema": laughs(30)}),
    "laughing arguments": with_kwargs(dropout=laughs(30)),
    "laughing multipliers": with_kwargs(channel_mult=laughs(30, 1)),
    "laughing noise grid": with_entry(sampling=sampling(levels=laughs(9, 1.0))),
    "laughing solver": with_entry(sampling=sampling(solver=laughs(9))),
    "a solver of gigabytes": with_entry(sampling=sampling(solver=["x" * MB] * 5000)),
    "a solver of gigabytes in keys": with_entry(sampling=sampling(solver=[{"x" * MB: 1}] * 5000)),
    "the same large object, often": many_entries(
        20_000, bare({"x": torch.zeros(1), **{f"{i}": 1 for i in range(40_000)}})
    ),
    "the same large dict, often": many_entries(20_000, {**{f"{i}": 1 for i in range(40_000)}, 1: 1}),
    "a solver of control characters": with_entry(sampling=sampling(solver="\x1b[2J\n\r")),
    "a ratio of gigabytes": with_entry(sampling=sampling(ratio=["x" * MB] * 5000)),
    "levels of a megabyte": with_entry(sampling=sampling(levels=["x" * MB])),
    "the same giant entry, often": many_entries(2000, [[] for _ in range(50_000)]),
    "deep lists": HEAD + b"]" * 240_000 + b"a" * 239_999 + b".",
    "deep tuples": HEAD + b")" + b"\x85" * 200_000 + b".",
    "deep dicts": HEAD + (b"}" + text("x")) * 100_000 + b"N" + b"s" * 100_000 + b".",
}

SIZES: dict[str, bytes | Builder] = {
    "a frame of exabytes": HEAD + b"\x95" + b"\xff" * 8 + b"N.",
    "bytes of exabytes": HEAD + b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "a text of exabytes": HEAD + b"\x8d" + b"\xff" * 7 + b"\x7f.",
    "a text of gigabytes": HEAD + b"X\xff\xff\xff\xff.",
    "bytes of gigabytes": HEAD + b"B\xff\xff\xff\x7f.",
    "a number that is cut off": HEAD + b"\x8a\xff1.",
    "two million sets": HEAD + b"\x8f" * 2_000_000 + b".",
    "two million byte strings": HEAD + b"C\x00" * 2_000_000 + b".",
    "four million memories": HEAD + b"N" + b"\x94" * 4_000_000 + b".",
    "as many sets as may be": HEAD + b"\x8f" * (MAX_INSTRUCTIONS - 1) + b".",
    "as many byte strings as may be": HEAD + b"C\x00" * (MAX_INSTRUCTIONS - 1) + b".",
    "as many remembered dicts as may be": HEAD + b"}\x94" * (MAX_INSTRUCTIONS // 2 - 1) + b".",
    "as many modules as may be": HEAD
    + name("torch.nn.modules.container", "ModuleDict")
    + b"q\x00"
    + b"h\x00)R" * 166_000
    + b".",
    "as much of everything as may be": as_much_as_may_be,
    "texts that grow to four times their size": HEAD
    + (b"X" + struct.pack("<I", MB) + b"\xf0\x9f\x98\x80" + b"x" * (MB - 4)) * 24
    + b".",
    "the same dict, a thousand times": many_copies(
        name(*ORDERED), 1000, b"".join(value(i) + b"N\x86" for i in range(20_000)), 1000
    ),
    "the same set, a thousand times": many_copies(
        name("builtins", "set"), 1000, b"".join(value(i) for i in range(50_000)), 1000
    ),
    "a storage of exabytes": tensor(storage(b"", 1 << 61), 0, (1 << 61,), (1,)),
    "a storage of less than nothing": tensor(storage(b"", -1), 0, (1,), (1,)),
    "a storage of more than it says": tensor(storage(bytes(400), 10), 0, (10,), (1,)),
    "a storage of less than it says": tensor(storage(bytes(4), 10), 0, (10,), (1,)),
    "a storage with two keys": tensor(storage(bytes(4), 1).replace(b"\x5d", b"\x5dNa"), 0, (1,), (1,)),
    "a storage of objects": tensor(storage(bytes(8), 1, "UntypedStorage"), 0, (1,), (1,)),
    "a storage of complex numbers": tensor(storage(bytes(8), 1, "ComplexFloatStorage"), 0, (1,), (1,)),
    "a storage that is an archive": tensor(saved([torch.zeros(1)]), 0, (1,), (1,)),
    "a storage within itself": tensor(storage(bytes(4), 1)[:60] * 3, 0, (1,), (1,)),
    "a tensor of exabytes in four bytes": tensor(storage(bytes(4), 1), 0, (1 << 60,), (0,)),
    "a tensor beyond its storage": tensor(storage(bytes(40), 10), 9, (2,), (1,)),
    "a tensor before its storage": tensor(storage(bytes(40), 10), -4, (2,), (1,)),
    "a tensor that goes backwards": tensor(storage(bytes(40), 10), 5, (5,), (-1,)),
    "a tensor of a thousand axes": tensor(storage(bytes(4), 1), 0, (1,) * 1000, (1,) * 1000),
    "a tensor of no axes that match": tensor(storage(bytes(4), 1), 0, (1, 1), (1,)),
    "a tensor of half elements": tensor(storage(bytes(8), 2), 0, (1.5,), (1,)),
    "a tensor of flags": tensor(storage(bytes(8), 2), 0, (True,), (1,)),
    "an empty tensor of exabytes": with_parameter("map_layer0", "weight", lambda: torch.empty(0, 1 << 40)),
    "tensors of one byte an element": as_type(torch.int8),
    "a network of endless width": with_kwargs(model_channels=1 << 62),
    "a network of negative width": with_kwargs(model_channels=-4),
    "a network of no width": with_kwargs(model_channels=0),
    "a network of fractional width": with_kwargs(model_channels=4.5),
    "a network of infinite width": with_kwargs(model_channels=float("inf")),
    "a network as wide as a text": with_kwargs(model_channels="x" * MB, channel_mult_emb=65_000),
    "a network as wide as a list": with_kwargs(model_channels=[0] * 900, channel_mult_emb=65_000),
    "a network as deep as a text": with_kwargs(num_blocks="x"),
    "endless multipliers": with_kwargs(channel_mult=[1] * 100_000),
    "multipliers of a text": with_kwargs(channel_mult="12"),
    "multipliers in lists": with_kwargs(channel_mult=[[1], [2]]),
    "multipliers in a dict": with_kwargs(channel_mult={"1": 2}),
    "endless blocks": with_kwargs(num_blocks=1 << 40),
    "thirty thousand blocks": with_kwargs(num_blocks=30_000),
    "as many blocks as may be": lambda: many_blocks(41),
    "more blocks than may be": lambda: many_blocks(42),
    "many noise levels": with_attribute("", CLASS="iDDPMPrecond", M=1 << 14),
    "endless filters": with_kwargs(resample_filter=[1.0] * 900),
    "a filter of one": with_kwargs(resample_filter=[1.0]),
    "a filter of nothing": with_kwargs(resample_filter=[]),
    "an endless image": with_kwargs(img_resolution=1 << 62),
    "an image of nothing": with_kwargs(img_resolution=0),
    "an image of less than nothing": with_kwargs(img_resolution=-8),
    "an image of half pixels": with_kwargs(img_resolution=8.5),
    "an image without a number": with_kwargs(img_resolution=float("nan")),
    "endless labels": with_kwargs(label_dim=1 << 40),
    "labels of a text": with_kwargs(label_dim="x"),
    "labels of nothing": with_kwargs(label_dim=None),
    "endless augmentation": with_kwargs(augment_dim=1 << 40),
    "an image of endless channels": with_kwargs(img_channels=1 << 40),
    "a model called os": with_kwargs(model_type="os"),
    "a model called like its wrapping": with_kwargs(model_type="EDMPrecond"),
    "a model called by a list": with_kwargs(model_type=["SongUNet"]),
    "a model called by a number": with_kwargs(model_type=7),
    "an embedding called os.system": with_kwargs(embedding_type="os.system"),
    "an argument that no network has": with_kwargs(__class__="os"),
    "an argument called self": with_kwargs(self=1),
    "an argument called device": with_kwargs(device="meta"),
    "an argument of a megabyte's name": with_kwargs(**{"x" * MB: 1}),
    "a dropout of three": with_attribute("model.enc.8x8_block0", dropout=3.0),
    "a block with more heads than it has": with_attribute("model.enc.8x8_block0", num_heads=7),
    "a layer that doubles the image on its own": with_attribute("model.enc.8x8_conv", up=True),
    "a tensor too few": spoiled(lambda states, rest: states["model.map_layer0"]["_parameters"].clear()),
    "a tensor too many": with_parameter("map_layer0", "spare", lambda: torch.zeros(1)),
    "a tensor of another shape": with_parameter("map_layer0", "weight", lambda: torch.zeros(1)),
    "a tensor that is a text": spoiled(
        lambda states, rest: states["model.map_layer0"]["_parameters"].update(weight="x")
    ),
    "a table that is a list": with_attribute("model", _parameters=[1]),
    "modules that are a list": with_attribute("model", _modules=[1]),
    "a module that is a text": with_attribute("model", _modules={"enc": "x"}),
    "a module of another class": with_attribute("model.enc.8x8_conv", CLASS="Linear"),
    "a module of a foreign class": with_attribute("model.enc.8x8_conv", CLASS="Wonder"),
    "positional arguments": with_attribute("", _init_args=(8, 2, 3, 4, 5, 6, 7, 8, 9)),
    "arguments that are a text": with_attribute("", _init_kwargs="os.system"),
    "arguments with a tensor": with_attribute("", _init_kwargs={"x": torch.zeros(1)}),
    "a noise grid that is a number": with_entry(sampling=7),
    "a noise grid without levels": with_entry(sampling={}),
    "a noise grid that rises": with_entry(sampling=sampling(levels=[1.0, 2.0, 0.0])),
    "a noise grid of no numbers": with_entry(sampling=sampling(levels=[float("nan"), 0.0])),
    "a noise grid of endless numbers": with_entry(sampling=sampling(levels=[float("inf"), 0.0])),
    "a student of endless steps": with_entry(loss_fn=student(1 << 60, 1)),
    "a student of too many steps": spoiled(lambda states, rest: None, {"loss_fn": student(99_999, 1)}, coarse),
    "a student of no steps": with_entry(loss_fn=student(0, 1)),
    "a student of half steps": with_entry(loss_fn=student(8.5, 1)),
    "a student of no ratio": with_entry(loss_fn=student(8, 0)),
    "a student of a ratio that doesn't divide": with_entry(loss_fn=student(8, 3)),
    "things left aside under long names": with_entry(
        sampling=7, **{"x" * MB: bare({"y" * MB + str(i): torch.zeros(1) for i in range(3)})}
    ),
    "the same things left aside, often": many_entries(
        5000, bare(dict.fromkeys(map(str, range(20_000)), torch.zeros(1)))
    ),
    "a noise grid with a bad past": with_entry(sampling=sampling(lineage=[[1]])),
}

FORMATS: dict[str, bytes | Builder] = {
    "empty": b"",
    "one byte": b"\x80",
    "zeros": bytes(MB),
    "ones": b"\xff" * MB,
    "text": b"import os\nos.system('true')\n" * 100,
    "JSON": b'{"ema": {}}',
    "a web page": b"<!DOCTYPE html><script>alert(1)</script>",
    "a pointer of git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "ELF": b"\x7fELF" + bytes(100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a compiled module": b"\xa7\r\r\n" + bytes(12) + marshal.dumps(compile("1", "x", "exec")),
    "a zip bomb": lambda: zipped(10, 4 * MB),
    "a zip bomb in a zip": lambda: zipped(1, MB)[:-22] + zipped(5, MB),
    "a gzip bomb": lambda: gzip.compress(bytes(40 * MB), 1),
    "a bzip2 bomb": lambda: bz2.compress(bytes(4 * MB)),
    "an xz bomb": lambda: lzma.compress(bytes(4 * MB), preset=0),
    "npz": lambda: npz(),
    "npy with a pickle": object_array,
    "torch.save": lambda: saved({"ema": torch.zeros(2)}),
    "torch.save of old": lambda: saved({"ema": torch.zeros(2)}, _use_new_zipfile_serialization=False),
    "torch.jit": lambda: b"PK\x03\x04" + saved({"code": 1})[4:],
    "protocol 0": b"(dS'ema'\nI1\ns.",
    "protocol 1": lambda: pickle.dumps({"ema": Call(eval, SPRING)}, 1),
    "protocol 6": b"\x80\x06N.",
    "protocol 255": b"\x80\xffN.",
    "marshal": marshal.dumps({"ema": 1}),
    "a list": pickle.dumps([1, 2]),
    "a large dict": pickle.dumps({f"{i}": i for i in range(60_000)}),
    "a dict of control characters": pickle.dumps({"\x1b[2J\n\r\t\0": 1, "\u2028": 2}),
    "a dict of long names": pickle.dumps({f"{i}" + "x" * MB: i for i in range(8)}),
    "a state dict": lambda: pickle.dumps({"ema": dict(network().state_dict())}),
    "StyleGAN's": pickle.dumps({"G_ema": None, "D": None}),
    "two networks": lambda: pickle.dumps({"ema": [1, 2]}),
}

LIES: dict[str, bytes | Builder] = {
    "a header of no length": safe(b"", b"{", 0),
    "a header of exabytes": safe({}, b"", (1 << 64) - 1),
    "a header of minus one": safe({}, b"", 1 << 63),
    "a header of 90 MB in 10": safe({}, b"", 90_000_000),
    "a header that is longer than the file": lambda: lying_length(+100_000),
    "a header that is too long": lambda: lying_length(+1),
    "a header that is too short": lambda: lying_length(-1),
    "a header of spaces": safe(b"{" + b" " * 10_000),
    "a header of 8 MB of spaces": lambda: padded_header(8 * MB),
    "a header of braces": safe(b"{" * 100_000),
    "a header of brackets": safe(b'{"a":' + b"[" * 100_000),
    "a header that is a list": safe(b"{}[]"),
    "a header that is no UTF-8": safe(b'{"\xff": 1}'),
    "a header in UTF-16": b"\x10\0\0\0\0\0\0\0" + '{"a": 1}'.encode("utf-16-le"),
    "an empty header": safe({}),
    "a tensor that is a number": lying(lambda header: header.update(a=1)),
    "a tensor that is null": lying(lambda header: header.update(a=None)),
    "a tensor without offsets": lying(lambda header: header.update(a={"dtype": "F32", "shape": [1]})),
    "a tensor's type unknown": lying_tensor(dtype="F31"),
    "a tensor's type a number": lying_tensor(dtype=32),
    "a tensor of another type": lying_tensor(dtype="F64"),
    "a tensor of another shape, safe": lying_tensor(shape=[1, 1]),
    "a tensor of negative shape": lying_tensor(shape=[-1, -16]),
    "a tensor of fractional shape": lying_tensor(shape=[1.5]),
    "a tensor of endless shape": lying_tensor(shape=[1 << 62, 1 << 62]),
    "a tensor of a shape beyond 64 bits": lying_tensor(shape=[1 << 70]),
    "a tensor whose shape overflows to right": lying_tensor(shape=[1 << 32, 1 << 32, 16]),
    "offsets that overlap": lying(
        lambda header: header[FIRST].update(data_offsets=header["model.map_layer0.weight"]["data_offsets"])
    ),
    "offsets that are reversed": lying(lambda header: header[FIRST]["data_offsets"].reverse()),
    "offsets beyond the file": lying_tensor(data_offsets=[1 << 40, (1 << 40) + 64]),
    "offsets beyond 64 bits": lying_tensor(data_offsets=[0, 1 << 70]),
    "negative offsets": lying_tensor(data_offsets=[-64, 0]),
    "offsets that are one": lying_tensor(data_offsets=[0]),
    "a hole": lying(lambda header: header.pop(FIRST)),
    "more bytes than tensors": lambda: good_safetensors() + b"x",
    "another file behind it": lambda: good_safetensors() + run_text(),
    "an empty tensor of the type F8_E8M0": extra_tensor("F8_E8M0", [0]),
    "an empty tensor of the type F4": extra_tensor("F4", [0]),
    "an empty tensor of the type F6": extra_tensor("F6_E2M3", [0]),
    "an empty tensor of endless shape": extra_tensor("F32", [0, 1 << 62, 1 << 62]),
    "an empty tensor beyond 63 bits": extra_tensor("F32", [0, (1 << 64) - 1]),
    "a hundred thousand axes": extra_tensor("F32", [0] * 100_000),
    "many empty tensors": lambda: empty_tensors(300_000),
    "as many empty tensors as may be": lambda: empty_tensors(MAX_HEADER // 60),
    "weights that are complex": lambda: retyped("C64", 8),
    "weights of F8_E8M0": lambda: retyped("F8_E8M0", 1),
    "weights of F8_E4M3": lambda: retyped("F8_E4M3", 1),
    "weights that are flags": lambda: retyped("BOOL", 1),
    "weights that are bytes": lambda: retyped("U8", 1),
    "weights that are unsigned": lambda: retyped("U64", 8),
    "no metadata": lying(lambda header: header.pop("__metadata__")),
    "metadata that is a text": lying(lambda header: header.update(__metadata__="x")),
    "metadata that is null": lying(lambda header: header.update(__metadata__=None)),
    "metadata of numbers": lying(lambda header: header["__metadata__"].update(x=1)),
    "metadata of another program": lying(lambda header: header.update(__metadata__={"format": "pt"})),
    "a network that is no JSON": metadata("os.system('true')"),
    "a network that is null": metadata("null"),
    "a network that is a list": metadata("[]"),
    "a network that is a number of 10000 digits": metadata("9" * 10_000),
    "a network of brackets": metadata("[" * 200_000),
    "a network of nested lists": metadata("[" * 900 + "]" * 900),
    "a network of ten million lists": metadata('{"a":[' + "[]," * 7_000_000 + "[]]}"),
    "a network of as many lists as may be": metadata('{"a":[' + "[]," * (MAX_HEADER // 3 - 10_000) + "[]]}"),
    "a network of megabytes": metadata('"' + "x" * 8 * MB + '"'),
    "a network without arguments": lying_network(lambda meta: meta.pop("init_kwargs")),
    "a network of os.system": lying_network(lambda meta: meta.update(class_name="os.system")),
    "a network of an inner class": lying_network(lambda meta: meta.update(class_name="SongUNet")),
    "a network of __class__": lying_network(lambda meta: meta.update(class_name="__class__")),
    "deep arguments, safe": lying_network(lambda meta: meta["init_kwargs"].update(dropout=nested(700))),
    "less deep arguments": lying_network(lambda meta: meta["init_kwargs"].update(dropout=nested(300))),
    "deep positional arguments": lying_network(lambda meta: meta.update(init_args=nested(700))),
    "deep entries": lying_network(lambda meta: meta["entries"].update(x=nested(700))),
    "a deep noise grid": lying_network(lambda meta: meta["entries"].update(sampling=sampling(solver=nested(700)))),
    "endless width, safe": lying_network(lambda meta: meta["init_kwargs"].update(model_channels=1 << 62)),
    "width of no number": lying_network(lambda meta: meta["init_kwargs"].update(model_channels=float("nan"))),
    "width of endlessly many digits": lying_network(lambda meta: meta["init_kwargs"].update(model_channels=10**4000)),
    "width of a text, safe": lying_network(
        lambda meta: meta["init_kwargs"].update(model_channels="x" * MB, channel_mult_emb=65_000)
    ),
    "endless blocks, safe": lying_network(lambda meta: meta["init_kwargs"].update(num_blocks=1 << 40)),
    "attributes that are a list": lying_network(lambda meta: meta.update(attributes={"model": [1]})),
    "attributes of __class__": lying_network(lambda meta: meta["attributes"].update({"": {"img_channels": 1 << 40}})),
    "heads that are not there": lying_network(
        lambda meta: meta["attributes"].update({"model.enc.8x8_block0": {"num_heads": 7}})
    ),
    "entries that are a list": lying_network(lambda meta: meta.update(entries=[1])),
    "a noise grid that is a text": lying_network(lambda meta: meta["entries"].update(sampling="x")),
    "a noise grid of 10000 digits": lying_network(
        lambda meta: meta["entries"].update(sampling=sampling(levels=[10**4000, 0]))
    ),
}

HOSTILE: dict[str, bytes | Builder] = {
    f"{group}, {key}": build
    for group, builders in (
        ("trap", TRAPS),
        ("call", CALLS),
        ("memo", MEMO),
        ("size", SIZES),
        ("format", FORMATS),
        ("safetensors", LIES),
    )
    for key, build in builders.items()
}
