//! The layout of the source tree: what belongs together stands together, and dependencies point
//! one way.

use std::fs;
use std::path::{Path, PathBuf};

/// The library's modules: each may use those before it.
const ORDER: [&str; 16] = [
    "error", "rng", "tensor", "device", "ops", "tape", "optim", "model", "data", "formats", "eval",
    "analysis", "train", "bench", "doctor", "report",
];

/// Files of `src/ops` and `src/optim` that are no operator: shared parts, tested through the
/// operators that use them.
const SHARED: [&str; 6] = ["head", "math", "mod", "multi_tensor", "stored", "update"];

const LONGEST_FILE: usize = 600;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Rust files below a folder, relative to the package.
fn sources(folder: &str) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![root().join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    assert!(!files.is_empty(), "no source in {folder}");
    files.sort();
    files
}

fn text(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The name of a file or folder without what follows the dot.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// The modules that a source names as `crate::module` or in a `crate::{…}` list.
fn uses(source: &str) -> Vec<&str> {
    fn name(text: &str) -> &str {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        &text[..text.find(|c| !is_name(c)).unwrap_or(text.len())]
    }
    let mut found = Vec::new();
    for after in source.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(list) => {
                let list = &list[..list.find(';').unwrap_or(list.len())];
                found.extend(list.split([',', '{', '}']).map(|part| name(part.trim())));
            }
            None => found.push(name(after)),
        }
    }
    found
}

#[test]
fn every_operator_and_optimizer_has_a_test_file_of_its_name() {
    for folder in ["src/ops", "src/optim"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let stem = stem(&entry.unwrap().path());
            let test = root().join(format!("tests/ops/{stem}.rs"));
            let excepted = SHARED.contains(&stem.as_str());
            assert!(
                excepted || test.is_file(),
                "{folder}/{stem} has no {test:?}"
            );
            let listed = text(Path::new("tests/ops/main.rs")).contains(&format!("mod {stem};"));
            assert!(excepted || listed, "tests/ops/main.rs lacks {stem}");
        }
    }
}

#[test]
fn no_source_file_is_too_long_to_read() {
    for path in ["src", "tests"].into_iter().flat_map(sources) {
        let lines = text(&path).lines().count();
        assert!(
            lines <= LONGEST_FILE,
            "{} has {lines} lines",
            path.display()
        );
    }
}

#[test]
fn nothing_prints_by_a_macro_that_panics_where_nobody_reads() {
    for path in sources("src") {
        let text = text(&path);
        for print in ["print!(", "println!(", "dbg!("] {
            assert!(!text.contains(print), "{} has {print}", path.display());
        }
    }
}

#[test]
fn modules_use_only_those_below_them() {
    let place = |module: &str| ORDER.iter().position(|m| *m == module);
    let mut checked = 0;
    for path in sources("src") {
        let module = path.iter().nth(1).unwrap();
        let module = stem(Path::new(module));
        if ["lib", "main", "cli"].contains(&module.as_str()) {
            continue;
        }
        let here = place(&module);
        assert!(
            here.is_some(),
            "{} has no place in the order",
            path.display()
        );
        for used in uses(&text(&path)) {
            let Some(there) = place(used) else {
                continue;
            };
            assert!(Some(there) <= here, "{} uses {used}", path.display());
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} uses found");
}

#[test]
fn uses_are_found_in_paths_and_in_lists() {
    let source = "use crate::ops::{gemm};\nuse crate::{Error, model::Sae, tape};\ncrate::eval::f()";
    let found: Vec<_> = uses(source).into_iter().filter(|u| !u.is_empty()).collect();
    assert_eq!(found, ["ops", "Error", "model", "tape", "eval"]);
}
