//! What nvcc makes of the kernels, read from the images of this build by cuobjdump: no spills, no
//! memory of a thread's own, tensor cores fed by asynchronous copies, and registers, shared memory,
//! occupancy and instructions as `kernels/static.txt` says, so that a change is seen. Needs no GPU.
//!
//! `RESA_BLESS=1 cargo test --test kernels` writes the table anew, for all architectures that the
//! build has.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

const HEADER: &str = "\
# What nvcc 13.0 makes of each kernel for each architecture. shared: bytes of a block, static +
# dynamic (at the shapes of a 1.5B model where it depends on them); local: bytes of a thread in
# local memory, its stack included; occupancy: share of a multiprocessor's warps that fit; then
# instructions in the code: multiplications by tensor cores (HMMA, HGMMA), asynchronous copies
# (LDGSTS, UTMALDG), loads of matrices (LDSM), FFMA, and loads and stores of local memory.
#
# kernel architecture threads registers shared local occupancy HMMA HGMMA LDGSTS UTMALDG LDSM FFMA \
local_accesses
";

/// Opcodes that are counted, in the order of the columns.
const OPCODES: [&[&str]; 7] = [
    &["HMMA"],
    &["HGMMA"],
    &["LDGSTS"],
    &["UTMALDG"],
    &["LDSM"],
    &["FFMA", "FFMA2"],
    &["LDL", "STL"],
];
const HMMA: usize = 0;
const HGMMA: usize = 1;
const LDGSTS: usize = 2;
const UTMALDG: usize = 3;
const LDSM: usize = 4;
const LOCAL: usize = 6;

/// Threads of a block where the kernel does not bound them: those of most launches.
const THREADS: u32 = 256;

/// Dynamic shared memory of a block, by the beginning of the kernel's name.
const DYNAMIC_SHARED: [(&str, u32); 35] = [
    // A row of 1536 values and its gradient, as an SAE's decoder has them.
    ("adamw_f32", 2 * 1536 * 4),
    ("flash_attention_backward_bf16_d128", 99_072),
    ("flash_attention_backward_bf16_d64", 49_920),
    ("flash_attention_backward_wgmma_bf16_d128", 200_328),
    ("flash_attention_backward_wgmma_bf16_d64", 170_696),
    ("flash_attention_forward_bf16_d128", 66_080),
    ("flash_attention_forward_bf16_d64", 49_696),
    ("flash_attention_forward_wgmma_bf16_d128", 164_456),
    ("flash_attention_forward_wgmma_bf16_d64", 148_104),
    // Stages of (m + n) x 64 bf16; with barriers and slabs of the result on Hopper.
    ("gemm_nn_masked_wgmma_128x192", 225_360),
    ("gemm_nn_wgmma_128x128", 217_184),
    ("gemm_nn_wgmma_128x192", 225_360),
    ("gemm_nt_wgmma_128x128", 217_184),
    ("gemm_nt_wgmma_128x192", 225_360),
    ("gemm_tn_wgmma_128x128", 217_184),
    ("gemm_tn_wgmma_128x192", 225_360),
    ("gemm_nn_128x128", 3 * 256 * 128),
    ("gemm_nn_128x256", 3 * 384 * 128),
    ("gemm_nt_128x128", 3 * 256 * 128),
    ("gemm_nt_128x256", 3 * 384 * 128),
    ("gemm_tn_128x128", 3 * 256 * 128),
    ("gemm_", 4 * 160 * 128),
    // Stages of 64 x (128 + 32 a module) bf16, backward with the bits of 64 x 128 values for each.
    ("lora_down_backward_1", 3 * (160 * 128 + 1024)),
    ("lora_down_backward_2", 3 * (192 * 128 + 2048)),
    ("lora_down_backward_3", 3 * (224 * 128 + 3072)),
    ("lora_down_forward_1", 3 * 160 * 128),
    ("lora_down_forward_2", 3 * 192 * 128),
    ("lora_down_forward_3", 3 * 224 * 128),
    ("lora_up_backward", 77_824),
    // w and a row (forward) or two (backward) for each warp, 1536 values each.
    ("rmsnorm_backward_bf16", 15 * 3072),
    ("rmsnorm_forward_bf16", 9 * 3072),
    ("signum_f32", 2 * 1536 * 4),
    ("topk_extend_lists_wgmma_128x192", 204_880),
    ("topk_extend_lists", 3 * 384 * 128),
    // A key of 8 bytes for each of k = 32 and of two rounds of 1024.
    ("topk_", 2080 * 8),
];

/// What a multiprocessor has: warps, blocks, bytes of shared memory (CUDA programming guide,
/// compute capabilities). All have 65 536 registers and keep 1 KiB of shared memory a block.
const MULTIPROCESSORS: [(&str, u32, u32, u32); 6] = [
    ("sm_80", 64, 32, 164 << 10),
    ("sm_86", 48, 16, 100 << 10),
    ("sm_89", 48, 24, 100 << 10),
    ("sm_90a", 64, 32, 228 << 10),
    ("sm_100a", 64, 32, 228 << 10),
    ("sm_120", 48, 24, 100 << 10),
];

/// Kernels of matrix products, by the beginnings of their names.
const PRODUCTS: [&str; 9] = [
    "gemm_nt",
    "gemm_nn",
    "gemm_tn",
    "flash_attention_forward",
    "flash_attention_backward_bf16",
    "topk_extend_lists",
    "lora_down_forward",
    "lora_down_backward",
    "lora_up_backward",
];

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir(kernels()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut sources: Vec<_> = paths
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    assert!(!sources.is_empty());
    sources
}

/// cuobjdump, which comes with nvcc or is installed beside it.
fn cuobjdump() -> Option<PathBuf> {
    let beside = Path::new(option_env!("RESA_NVCC")?).with_file_name("cuobjdump");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("cuobjdump"));
    let found = on_path.chain([beside]).find(|p| p.is_file());
    if found.is_none() {
        println!("skipped: no cuobjdump on PATH or beside nvcc");
    }
    found
}

/// The images that build.rs made, with the code of all architectures.
fn images() -> Vec<PathBuf> {
    let folder = Path::new(env!("OUT_DIR"));
    let images = sources().into_iter().map(|source| {
        let name = source.file_stem().unwrap().to_owned();
        folder.join(name).with_extension("fatbin")
    });
    images.collect()
}

/// One kernel on one architecture.
#[derive(Clone, Debug, Default, PartialEq)]
struct Kernel {
    threads: u32,
    registers: u32,
    shared: u32,
    local: u32,
    opcodes: [u32; OPCODES.len()],
}

/// By name and architecture.
type Table = BTreeMap<(String, String), Kernel>;

/// Calls `line` with each line that cuobjdump prints about an image.
fn dump(tool: &Path, option: &str, image: &Path, mut line: impl FnMut(&str)) {
    let mut command = Command::new(tool);
    let command = command.arg(option).arg(image).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    for text in BufReader::new(child.stdout.take().unwrap()).lines() {
        line(&text.unwrap());
    }
    assert!(
        child.wait().unwrap().success(),
        "{option} {}",
        image.display()
    );
}

/// The number after `key` in a line such as `REG:32 STACK:0`.
fn number(line: &str, key: &str) -> u32 {
    let (_, after) = line
        .split_once(key)
        .unwrap_or_else(|| panic!("no {key} in {line}"));
    let digits = after.split(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap().parse().unwrap()
}

/// The opcode of a line of machine code, without its modifiers.
fn opcode(line: &str) -> Option<&str> {
    let mut words = line
        .trim_start()
        .strip_prefix("/*")?
        .split_once("*/")?
        .1
        .split_whitespace();
    let first = words.next()?;
    let opcode = if first.starts_with('@') {
        words.next()?
    } else {
        first
    };
    Some(opcode.split(['.', ';']).next().unwrap_or(opcode))
}

/// Adds what cuobjdump says of an image.
fn read(tool: &Path, image: &Path, table: &mut Table) {
    let (mut architecture, mut name) = (String::new(), String::new());
    dump(tool, "-res-usage", image, |line| {
        if let Some(found) = line.strip_prefix("arch = ") {
            architecture = found.to_owned();
        } else if let Some(found) = line.trim_start().strip_prefix("Function ") {
            name = found.trim_end_matches(':').to_owned();
        } else if line.contains("REG:") {
            let kernel = Kernel {
                threads: THREADS,
                registers: number(line, "REG:"),
                shared: number(line, "SHARED:") + dynamic_shared(&name),
                local: number(line, "STACK:") + number(line, "LOCAL:"),
                ..Kernel::default()
            };
            table.insert((name.clone(), architecture.clone()), kernel);
        }
    });
    let (mut architecture, mut name) = (String::new(), String::new());
    dump(tool, "-sass", image, |line| {
        if let Some(found) = line.strip_prefix("arch = ") {
            architecture = found.to_owned();
        } else if let Some(found) = line.trim_start().strip_prefix("Function : ") {
            name = found.to_owned();
        } else if let Some(found) = opcode(line) {
            let Some(column) = OPCODES.iter().position(|names| names.contains(&found)) else {
                return;
            };
            let key = (name.clone(), architecture.clone());
            table.get_mut(&key).unwrap().opcodes[column] += 1;
        }
    });
    let (mut name, mut dynamic) = (String::new(), Vec::new());
    dump(tool, "-ptx", image, |line| {
        if let Some((_, after)) = line.split_once(".entry ") {
            name = after.trim_end_matches('(').to_owned();
        } else if let Some(found) = line.strip_prefix(".maxntid ") {
            let threads = number(found, "");
            let kernels = table.iter_mut().filter(|((kernel, _), _)| *kernel == name);
            kernels.for_each(|(_, kernel)| kernel.threads = threads);
        } else if let Some((_, after)) = line.split_once(".extern .shared ") {
            let variable = after.split(' ').next_back().unwrap_or_default();
            dynamic.push(variable.trim_end_matches("[];").to_owned());
        } else if words(line).any(|word| dynamic.iter().any(|variable| variable == word)) {
            assert!(
                dynamic_shared(&name) > 0,
                "{name} has dynamic shared memory, but DYNAMIC_SHARED does not say how much"
            );
        }
    });
}

/// The names and numbers in a line of PTX; `st.shared.f32` is one.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_ascii_alphanumeric() || "_.$%".contains(c)))
}

fn dynamic_shared(kernel: &str) -> u32 {
    let found = DYNAMIC_SHARED
        .iter()
        .find(|(name, _)| kernel.starts_with(name));
    let has = ![
        "topk_age",
        "topk_backward",
        "topk_dead",
        "topk_fire",
        "topk_prepare",
    ]
    .iter()
    .chain(&["topk_rectify", "gemm_sum"])
    .any(|name| kernel == *name);
    found.filter(|_| has).map_or(0, |(_, bytes)| *bytes)
}

/// The share of a multiprocessor's warps that fit on it, in percent.
fn occupancy(kernel: &Kernel, architecture: &str) -> u32 {
    let found = MULTIPROCESSORS
        .iter()
        .find(|(name, ..)| *name == architecture);
    let (_, most_warps, most_blocks, shared) = found.expect("a known architecture");
    let warps = kernel.threads.div_ceil(32);
    // Registers are given out to a warp in units of 256, to four parts of a multiprocessor.
    let by_registers = 16_384 / (kernel.registers * 32).next_multiple_of(256) * 4 / warps;
    let by_shared = shared / (kernel.shared + 1024);
    let blocks = (most_warps / warps)
        .min(by_registers)
        .min(by_shared)
        .min(*most_blocks);
    100 * blocks * warps / most_warps
}

fn table(tool: &Path) -> Table {
    let table = Mutex::new(Table::new());
    let images = Mutex::new(images().into_iter());
    let read_all = || {
        loop {
            let Some(image) = images.lock().unwrap().next() else {
                return;
            };
            let mut found = Table::new();
            read(tool, &image, &mut found);
            table.lock().unwrap().append(&mut found);
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(read_all);
        }
    });
    table.into_inner().unwrap()
}

fn line_of((name, architecture): &(String, String), kernel: &Kernel) -> String {
    let Kernel {
        threads,
        registers,
        shared,
        local,
        opcodes,
    } = kernel;
    let occupancy = occupancy(kernel, architecture);
    let mut line =
        format!("{name} {architecture} {threads} {registers} {shared} {local} {occupancy}%");
    for count in opcodes {
        write!(line, " {count}").unwrap();
    }
    line
}

/// Fails on what no kernel may have, and where a matrix kernel lacks what it is made of.
fn check((name, architecture): &(String, String), kernel: &Kernel) {
    let has = |opcode: usize| kernel.opcodes[opcode] > 0;
    assert!(
        kernel.local == 0 && !has(LOCAL),
        "{name} on {architecture} uses local memory: {kernel:?}"
    );
    if name.contains("_wgmma_") {
        assert!(
            has(HGMMA) && has(UTMALDG),
            "{name} on {architecture}: {kernel:?}"
        );
    } else if PRODUCTS.iter().any(|product| name.starts_with(product)) {
        assert!(
            has(HMMA) && has(LDSM),
            "{name} on {architecture}: {kernel:?}"
        );
        // Rows at any address are copied value by value.
        let copies = has(LDGSTS) || name.ends_with("_unaligned");
        assert!(copies, "{name} on {architecture}: {kernel:?}");
        let fits = occupancy(kernel, architecture) > 0 || WIDE_TILES.contains(&name.as_str());
        assert!(
            fits,
            "a block of {name} does not fit {architecture}: {kernel:?}"
        );
    }
}

/// Launched only where a block may have their shared memory.
const WIDE_TILES: [&str; 3] = ["gemm_nt_128x256", "gemm_nn_128x256", "topk_extend_lists"];

#[test]
fn kernels_are_those_of_the_committed_table_on_every_architecture() {
    let Some(nvcc) = option_env!("RESA_NVCC") else {
        println!("skipped: built without nvcc");
        return;
    };
    let version = Command::new(nvcc).arg("--version").output().unwrap();
    if !String::from_utf8_lossy(&version.stdout).contains("release 13.0") {
        println!("skipped: the table is for nvcc 13.0");
        return;
    }
    let Some(tool) = cuobjdump() else { return };
    let table = table(&tool);
    table.iter().for_each(|(key, kernel)| check(key, kernel));
    let found: Vec<String> = table
        .iter()
        .map(|(key, kernel)| line_of(key, kernel))
        .collect();
    let path = kernels().join("static.txt");
    if std::env::var("RESA_BLESS").is_ok_and(|v| v == "1") {
        fs::write(&path, format!("{HEADER}{}\n", found.join("\n"))).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    assert!(committed.starts_with(HEADER), "if intended: RESA_BLESS=1");
    let is_built = |line: &&str| {
        let architecture = line.split(' ').nth(1).unwrap_or_default();
        table.keys().any(|(_, built)| built == architecture)
    };
    let lines = committed.lines().filter(|line| !line.starts_with('#'));
    let expected: Vec<&str> = lines.filter(is_built).collect();
    if table.is_empty() {
        println!("the images of this build hold no machine code: RESA_CUDA_ARCHS was empty");
    }
    let missing = expected
        .iter()
        .filter(|line| !found.iter().any(|f| f == *line));
    let new = found
        .iter()
        .filter(|line| !expected.contains(&line.as_str()));
    let missing: String = missing.map(|line| format!("- {line}\n")).collect();
    let new: String = new.map(|line| format!("+ {line}\n")).collect();
    assert!(
        missing.is_empty() && new.is_empty(),
        "{missing}{new}if intended: RESA_BLESS=1"
    );
}

#[test]
fn every_kernel_file_has_an_operator_of_its_name() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let is_operator = |stem: &str| {
        let files = ["ops", "optim"].map(|folder| src.join(folder).join(stem));
        files
            .iter()
            .any(|f| f.is_dir() || f.with_extension("rs").is_file())
    };
    for source in sources() {
        let stem = source.file_stem().unwrap().to_string_lossy().into_owned();
        // A long stem has a file for each direction or for each factor of adapters, and may have one
        // for an architecture.
        let parts = ["_sm90a", "_forward", "_backward", "_down", "_up"];
        let stem = parts.iter().fold(stem.as_str(), |stem, part| {
            stem.strip_suffix(part).unwrap_or(stem)
        });
        // The device's own: sums of gradients, conversions.
        assert!(
            is_operator(stem) || ["add", "cast"].contains(&stem),
            "{stem} is no operator"
        );
    }
}

fn kernel(registers: u32, local_loads: u32) -> Kernel {
    let mut kernel = Kernel {
        threads: 256,
        registers,
        shared: 0,
        ..Kernel::default()
    };
    kernel.opcodes[LOCAL] = local_loads;
    kernel
}

#[test]
#[should_panic(expected = "wasteful on sm_80 uses local memory")]
fn a_kernel_that_spills_is_refused() {
    check(&("wasteful".to_owned(), "sm_80".to_owned()), &kernel(32, 1));
}

#[test]
#[should_panic(expected = "gemm_nt_64x64 on sm_80")]
fn a_product_without_tensor_cores_is_refused() {
    check(
        &("gemm_nt_64x64".to_owned(), "sm_80".to_owned()),
        &kernel(32, 0),
    );
}

/// By hand from the programming guide: 64 warps of 32 registers fill a multiprocessor of 65 536
/// registers, of 33 (given out as 40) only 48, which is 6 blocks of 8.
#[test]
fn occupancy_is_that_of_the_programming_guide() {
    assert_eq!(occupancy(&kernel(32, 0), "sm_80"), 100);
    assert_eq!(occupancy(&kernel(33, 0), "sm_80"), 75);
    assert_eq!(occupancy(&kernel(255, 0), "sm_80"), 12);
    let shared = Kernel {
        shared: 98_304,
        ..kernel(32, 0)
    };
    assert_eq!(occupancy(&shared, "sm_86"), 16);
    assert_eq!(occupancy(&shared, "sm_90a"), 25);
}
