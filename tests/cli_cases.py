"""Calls of the command that cannot be right, each with the whole message it gets."""

# ruff: noqa: E501 (a message is one line)

RECIPE = """\
# A small network, for tests.
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 48]}
swap:
  - layers: head.conv
    guidance: {from: layer1, channels: 4}
"""
SECOND = "guidance: layer1\n  - {layers: 'head.*', guidance: layer1}\n"
GUIDANCE = "{from: layer1, channels: 4}\n"
MISFIT = ". Use the file of this very network, or mend model.name and model.args (num_classes?)."

# id: (what of the recipe is replaced, by what, the message)
RECIPES = {
    "misspelt key": ("channels", "chanels", "r.yaml:6:30: swap[0].guidance.chanels: unknown key. Nearest: 'channels'."),
    "two faults": ("channels: 4", "chanels: 4, resize: cubic", "r.yaml has 2 faults:\nr.yaml:6:30: swap[0].guidance.chanels: unknown key. Nearest: 'channels'.\nr.yaml:6:50: swap[0].guidance.resize: expected 'bilinear', 'nearest' or 'area', got 'cubic'."),
    "a bare text": (RECIPE, "hello\n", "r.yaml:1:1: expected a mapping of 'version', 'model', 'calibration', 'swap', 'pool', 'upsample', 'append', 'finetune', got 'hello'."),
    "not YAML": ("[3, 48", "[3, 48]", "r.yaml:3:82: not YAML: while parsing a flow mapping from 3:8, expected ',' or '}', but got ']'."),
    "code in YAML": ("null", "!!python/object/apply:os.system [touch ran]", "r.yaml:3:53: model.weights: the tag '!!python/object/apply:os.system' is not read: a recipe is plain data. Remove the tag."),
    "library": ("pacswap", "torchvison", "r.yaml:3:18: model.library: expected 'timm', 'torchvision', 'python' or 'pacswap', got 'torchvison'. Nearest: 'torchvision'."),
    "model": ("scene_net", "scenenet", "pacswap has no model 'scenenet'. Nearest: 'scene_net'. List them: pacswap ls models pacswap"),
    "python without trust": ("pacswap, name: scene_net", "python, name: 'os:system'", "library 'python' runs the code of 'os:system'. If you trust it, say so: --trust-python on the command line, trust_python=True in Python."),
    "args": ("scene_net", "scene_net, args: {widht: 8}", "cannot build pacswap model 'scene_net' with args {'widht': 8}: TypeError: SceneNet.__init__() got an unexpected keyword argument 'widht'. Mend model.args."),
    "weights tag": ("null", "NOPE", "pacswap model 'scene_net' has no weights 'NOPE'. Known: 'DEFAULT'. Or set a file, or null for random ones."),
    "weights of another sort": ("null", "w.onnx", "r.yaml:3:53: model.weights: expected a tag of the library or a file that ends in .safetensors, .pth or .pt, got 'w.onnx'."),
    "no weights file": ("null", "none.pth", "no weights file 'none.pth'. Paths in a recipe start at the recipe's folder; set model.weights to an existing file, a tag, or null for random weights."),
    "weights with code": ("null", "code.pth", "'code.pth' holds more than tensors (posix.system), and reading that would run code from the file. Refused. Save the weights alone: safetensors.torch.save_file(model.state_dict(), …)."),
    "weights of other shapes": ("null", "shapes.pth", "'shapes.pth' does not fit SceneNet: 1 of another shape ('head.classifier.bias' [9] (expected [6]))" + MISFIT),
    "weights truncated": ("null", "cut.safetensors", "'cut.safetensors' is not a readable safetensors file: Error while deserializing header: incomplete metadata, file not fully covered. It may be truncated; copy or download it again."),
    "no layer": ("head.conv", "hed.conv", "r.yaml:5:13: swap[0].layers: 'hed.conv' matches no convolution (17 found). Nearest: 'head.conv', 'stem.conv', 'layer3.1.conv2'. List them: pacswap ls layers pacswap/scene_net"),
    "no layer for a glob": ("head.conv", "'tail.*'", "r.yaml:5:13: swap[0].layers: 'tail.*' matches no convolution (17 found). List them: pacswap ls layers pacswap/scene_net"),
    "no layer for a query": ("head.conv", "{kernel_size: 9}", "r.yaml:5:13: swap[0].layers: none of the 14 spatial convolutions has kernel_size=9."),
    "an exclusion of nothing": ("head.conv", "{name: head.conv, exclude: tail}", "r.yaml:5:13: swap[0].layers: exclude: 'tail' matches none of the 14 spatial convolutions. Leave it out or mend it."),
    "a container": ("head.conv", "layer1", "r.yaml:5:13: swap[0].layers: 'layer1' is a Sequential, not a convolution. Convolutions in it: 'layer1.0.conv1', 'layer1.0.conv2', 'layer1.1.conv1'."),
    "a layer of 1×1": ("head.conv", "head.classifier", "r.yaml:5:13: swap[0].layers: cannot swap 'head.classifier': it is 1×1: a single tap has no neighbours to weigh. Name the spatial convolutions only."),
    "a regular expression": ("head.conv", "'re:('", "r.yaml:5:13: swap[0].layers: expected a regular expression after 're:', got 're:(': missing ), unterminated subpattern at position 0."),
    "claimed twice": ("guidance: " + GUIDANCE, SECOND, "r.yaml cannot be carried out on pacswap scene_net, 2 faults:\nr.yaml:7:14: swap[1].layers: 'head.conv' is claimed by swap[0] already. Exclude it from one of them, or set override: true on this group.\nr.yaml:7:14: swap[1].layers: cannot swap 'head.classifier': it is 1×1: a single tap has no neighbours to weigh. Name the spatial convolutions only."),
    "no guidance": ("from: layer1", "from: layr1", "r.yaml:6:15: swap[0].guidance: 'layr1' is no layer of the model and no node of its trace. Nearest: 'layer1', 'layer3.1', 'layer2.1'."),
    "guidance of itself": ("from: layer1", "from: head.conv", "r.yaml:6:15: swap[0].guidance: 'head.conv' cannot guide itself. Name a layer that runs earlier."),
    "guidance twice": ("from: layer1", "from: [layer1, layer1]", "r.yaml:6:15: swap[0].guidance: 'layer1' is named twice. Once is enough."),
    "external, projected": ("from: layer1", "from: external", "r.yaml:6:15: swap[0].guidance: the number of channels of an external guidance is not known, so it cannot be projected. Leave channels out and project it yourself."),
    "negative size": ("[3, 48", "[3, -48", "r.yaml:3:75: model.input_size[1]: expected at least 1, got -48."),
    "no pictures": ("swap:", "calibration: {images: none}\nswap:", "r.yaml:4:23: calibration.images: 'none' is not a readable image: [Errno 2] No such file or directory: 'none'"),
    "pictures of text": ("swap:", "calibration: {images: r.yaml}\nswap:", "r.yaml:4:23: calibration.images: 'r.yaml' is not a readable image: cannot identify image file 'r.yaml'"),
    "a picture that explodes": ("swap:", "calibration: {images: bomb.png}\nswap:", "r.yaml:4:23: calibration.images: 'bomb.png' is not a readable image: Image size (10000000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack."),
    "an empty folder": ("swap:", "calibration: {images: empty}\nswap:", "r.yaml:4:23: calibration.images: 'empty' has no files."),
}  # fmt: skip

# id: (the arguments, the message)
CALLS = {
    "no such command": (["aply"], "No such command 'aply'. Did you mean 'apply'?\nHow to call it: pacswap --help"),
    "no such subcommand": (["ls", "nope"], "No such command 'nope'.\nHow to call it: pacswap ls --help"),
    "no such option": (["plan", "r.yaml", "--colour"], "No such option: --colour\nHow to call it: pacswap plan --help"),
    "no recipe": (["apply"], "Missing argument 'RECIPE'.\nHow to call it: pacswap apply --help"),
    "too many arguments": (["schema", "x"], "Got unexpected extra argument(s) (x)\nHow to call it: pacswap schema --help"),
    "an option without its value": (["apply", "r.yaml", "-o"], "Option '-o' requires an argument.\nHow to call it: pacswap --help"),
    "no such file": (["plan", "none.yaml"], "no recipe 'none.yaml': neither a file nor a shipped recipe. List them: pacswap ls recipes"),
    "a directory": (["plan", "."], "no recipe '.': neither a file nor a shipped recipe. List them: pacswap ls recipes"),
    "misspelt recipe": (["validate", "quickstat"], "no recipe 'quickstat': neither a file nor a shipped recipe. Nearest: 'quickstart'. List them: pacswap ls recipes"),
    "a name that steers the terminal": (["ls", "layers", "\x1b[31m"], "timm has no model '\\x1b[31m'. List them: pacswap ls models timm"),
    "unreadable": (["plan", "/proc/self/mem"], "/proc/self/mem: cannot be read (Input/output error). Name a YAML file."),
    "weights for a recipe": (["plan", "cut.safetensors"], "cut.safetensors:1:8521: not UTF-8 text (byte 0xe8). Save the file as UTF-8."),
    "an override of nothing": (["plan", "r.yaml", "model.weigths=null"], "override 'model.weigths=null': model.weigths: unknown key. Nearest: 'weights'."),
    "no override": (["plan", "r.yaml", "quickly"], "override 'quickly': expected key.sub[0].x=value, such as model.weights=null."),
    "an override out of range": (["apply", "r.yaml", "swap[0].kernel.bandwidth=0"], "override 'swap[0].kernel.bandwidth=0': swap[0].kernel.bandwidth: expected more than 0, got 0."),
    "an override that does not fit": (["plan", "r.yaml", "swap[0].layers=x"], "override 'swap[0].layers=x': swap[0].layers: 'x' matches no convolution (17 found). List them: pacswap ls layers pacswap/scene_net"),
    "output is a model": (["apply", "r.yaml", "-o", "model"], "'model' exists. Name another directory, or replace it: --overwrite on the command line, overwrite=True in Python."),
    "output is no model": (["apply", "r.yaml", "-o", "photos", "--overwrite"], "'photos' exists and is not a model directory; it is not replaced. Name another one."),
    "output is a file": (["apply", "r.yaml", "-o", "r.yaml"], "'r.yaml' exists and is not a model directory; it is not replaced. Name another one."),
    "output is here": (["apply", "r.yaml", "-o", "."], "'.' is the working directory, which cannot be replaced. Name another one."),
    "copy of nothing": (["cp", "quickstar", "x.yaml"], "no recipe 'quickstar': neither a file nor a shipped recipe. Nearest: 'quickstart'. List them: pacswap ls recipes"),
    "copy over a file": (["cp", "quickstart", "r.yaml"], "r.yaml exists and is not overwritten. Name another file."),
    "copy to nowhere": (["cp", "quickstart", "none/"], "none/: no such folder. Make it, or name the new file."),
    "no such model": (["ls", "models", "zzz"], "no model matches 'zzz'. Try a glob: pacswap ls models '*zzz*'"),
    "models by a broken pattern": (["ls", "models", "re:("], "'re:(' is not a regular expression: missing ), unterminated subpattern at position 0."),
    "layers of nothing": (["ls", "layers", "torchvision/alexnt"], "torchvision has no model 'alexnt'. Nearest: 'alexnet', 'googlenet'. List them: pacswap ls models torchvision"),
    "layers of a stranger": (["ls", "layers", "python/os:system"], "library 'python' runs the code of 'os:system'. If you trust it, say so: --trust-python on the command line, trust_python=True in Python."),
}  # fmt: skip
