//! Models, adapters, SAEs and data by their hub ids, from a hub on this machine: what is fetched,
//! what the cache is good for, and what is said where there is nothing to be had.

mod server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::support::{Workshop, fixture, stderr};
use server::{Access, COMMIT, Files, HubServer, Repositories, Request};

const MODEL: &str = "org/tiny";

fn files_of(dir: &Path, prefix: &str) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        match path.is_dir() {
            true => files.extend(files_of(&path, &format!("{name}/"))),
            false => drop(files.insert(name, fs::read(path).unwrap())),
        }
    }
    files
}

/// The example's target with files beside it that the engine has no use for.
fn model() -> Files {
    let mut files = files_of(&fixture("example/target"), "");
    for name in ["README.md", "pytorch_model.bin", "onnx/model.onnx"] {
        files.insert(name.to_owned(), b"of no use".to_vec());
    }
    files
}

fn hub(repositories: &[(&str, Access, Files)]) -> HubServer {
    let mut all = Repositories::default();
    for (path, access, files) in repositories {
        all.add(path, *access, files.clone());
    }
    HubServer::start(all)
}

/// The program with a cache in the workshop, and no hub but the one given.
fn command(workshop: &Workshop, endpoint: &str, args: &[&str]) -> Command {
    let mut command = workshop.command(args);
    for name in [
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_OFFLINE",
    ] {
        command.env_remove(name);
    }
    // A proxy of the machine is not to be asked for addresses on this machine.
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command.env("HF_ENDPOINT", endpoint);
    command.env("HF_HOME", workshop.path("home"));
    command
}

fn output(workshop: &Workshop, endpoint: &str, args: &[&str]) -> Output {
    command(workshop, endpoint, args).output().unwrap()
}

fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Arguments that measure the perplexity of a model on `data.jsonl`.
fn perplexity(model: &str) -> Vec<&str> {
    let args = [
        "eval",
        "--perplexity",
        "--json",
        "--seq-len",
        "40",
        "--threads",
        "1",
    ];
    [&args[..], &["--data", "data.jsonl", "--model", model]].concat()
}

#[test]
fn a_model_is_fetched_once_and_then_used_from_the_cache_without_a_network() {
    let hub = hub(&[(MODEL, Access::Open, model())]);
    let workshop = Workshop::new(20);
    let local = fixture("example/target");
    let expected = workshop.prints(&perplexity(local.to_str().unwrap()));
    let first = command(&workshop, &hub.endpoint, &perplexity(MODEL))
        .env("HF_TOKEN", "hf_secret")
        .output()
        .unwrap();
    assert_eq!(succeeds(&first), expected);
    assert!(
        stderr(&first).contains("model.safetensors"),
        "{}",
        stderr(&first)
    );
    let wanted = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(hub.files(), wanted);
    for Request { path, token, .. } in hub.requests() {
        assert_eq!(token.as_deref(), Some("Bearer hf_secret"), "{path}");
    }
    // The layout of the Python tools.
    let repository = workshop.path("home/hub/models--org--tiny");
    assert_eq!(
        fs::read_to_string(repository.join("refs/main")).unwrap(),
        COMMIT
    );
    let config = repository
        .join("snapshots")
        .join(COMMIT)
        .join("config.json");
    assert_eq!(fs::read(config).unwrap(), model()["config.json"]);

    // A second time the hub is asked what is there, and nothing is downloaded again.
    let before = hub.requests().len();
    assert_eq!(
        succeeds(&output(&workshop, &hub.endpoint, &perplexity(MODEL))),
        expected
    );
    assert_eq!(hub.requests().len(), before + 1);
    let offline = command(&workshop, &hub.endpoint, &perplexity(MODEL))
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert_eq!(succeeds(&offline), expected);
    assert_eq!(hub.requests().len(), before + 1);
    // Where the hub cannot be reached the cache is used too, and that is said.
    let unreachable = output(&workshop, "http://127.0.0.1:1", &perplexity(MODEL));
    assert_eq!(succeeds(&unreachable), expected);
    assert!(
        stderr(&unreachable).contains("taken from the cache"),
        "{}",
        stderr(&unreachable)
    );
}

#[test]
fn a_run_on_a_model_data_and_adapter_of_the_hub_names_the_id_in_its_adapter() {
    let data = fs::read(fixture("example/problems.jsonl")).unwrap();
    let lines: Vec<&[u8]> = data.split_inclusive(|&c| c == b'\n').take(20).collect();
    let data = Files::from([
        (
            "data/train-00000-of-00002.jsonl".to_owned(),
            lines[..12].concat(),
        ),
        (
            "data/train-00001-of-00002.jsonl".to_owned(),
            lines[12..].concat(),
        ),
        ("data/test.jsonl".to_owned(), b"{}".to_vec()),
    ]);
    let workshop = Workshop::new(20);
    let more = ["--stage", "all", "--epochs", "1"];
    workshop.train("local", &more);
    let hub = hub(&[
        (MODEL, Access::Open, model()),
        ("datasets/org/problems", Access::Open, data),
        (
            "org/sae",
            Access::Open,
            files_of(&workshop.path("local/sae"), ""),
        ),
        (
            "org/lora",
            Access::Open,
            files_of(&workshop.path("local/adapter"), ""),
        ),
    ]);
    let from_hub = ["--target", "org/tiny@v1", "--data", "org/problems"];
    let train = |out: &str, more: &[&str]| {
        let args = workshop.train_args(out, &[&from_hub[..], more].concat());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        succeeds(&output(&workshop, &hub.endpoint, &args))
    };
    let plan = train("dry", &["--dry-run"]);
    assert!(plan.contains("Stage II"), "{plan}");
    train("run", &more);
    let read = |run: &str, name: &str| fs::read(workshop.path(run).join(name)).unwrap();
    let weights = "adapter/adapter_model.safetensors";
    assert!(
        read("run", weights) == read("local", weights),
        "another adapter"
    );
    let config: Value =
        serde_json::from_slice(&read("run", "adapter/adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], MODEL);
    assert_eq!(config["revision"], "v1");
    assert!(
        !workshop
            .path("home/hub/datasets--org--problems/snapshots")
            .join(COMMIT)
            .join("data/test.jsonl")
            .exists()
    );

    // Stage II alone, on an SAE and an adapter of the hub.
    train(
        "second",
        &[
            "--stage",
            "sft",
            "--sae",
            "org/sae",
            "--sae-init",
            "pretrained",
            "--adapter",
            "org/lora",
            "--epochs",
            "1",
        ],
    );
    let args = perplexity(MODEL);
    let with = [
        &args[..],
        &["--adapter", "org/lora", "--sae", "org/sae", "--layer", "2"],
    ]
    .concat();
    let got = succeeds(&output(&workshop, &hub.endpoint, &with));
    let local = fixture("example/target");
    let args = perplexity(local.to_str().unwrap());
    let with = [
        "--adapter",
        "local/adapter",
        "--sae",
        "local/sae",
        "--layer",
        "2",
    ];
    assert_eq!(got, workshop.prints(&[&args[..], &with].concat()));
}

#[test]
fn what_cannot_be_had_is_an_error_that_names_the_id_and_says_what_to_do() {
    let mut incomplete = model();
    incomplete.remove("model.safetensors");
    let hub = hub(&[
        ("org/gated", Access::Gated, model()),
        ("org/other", Access::Open, incomplete),
    ]);
    let workshop = Workshop::new(5);
    let here = hub.endpoint.as_str();
    let nowhere = "http://127.0.0.1:1";
    for (endpoint, offline, id, says) in [
        (here, "0", "org/missing", &["HTTP 401", "HF_TOKEN"][..]),
        (
            here,
            "0",
            "org/gated",
            &["gated", "403", "HF_TOKEN", "/org/gated"],
        ),
        (here, "0", "org/other", &["model.safetensors"]),
        (here, "0", "org/other@v9", &["revision"]),
        (
            here,
            "1",
            "org/missing",
            &["HF_HUB_OFFLINE", "cache", "home/hub"],
        ),
        (nowhere, "0", "org/missing", &[nowhere, "cache"]),
        (here, "0", "no/such/folder", &["hub id", "org/name"]),
    ] {
        let output = command(&workshop, endpoint, &perplexity(id))
            .env("HF_HUB_OFFLINE", offline)
            .output()
            .unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{id}: {error}");
        for says in says.iter().chain([&id]) {
            assert!(error.contains(says), "{id}: no {says:?} in: {error}");
        }
    }
    // A file name is no id, whatever its form.
    let args = [
        "eval",
        "--perplexity",
        "--model",
        "x",
        "--data",
        "some/data.jsonl",
    ];
    let local = fixture("example/target");
    let args = args.map(|arg| {
        if arg == "x" {
            local.to_str().unwrap()
        } else {
            arg
        }
    });
    let before = hub.requests().len();
    let output = output(&workshop, here, &args);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("some/data.jsonl"),
        "{}",
        stderr(&output)
    );
    assert_eq!(hub.requests().len(), before);
}

#[test]
fn a_local_folder_wins_over_an_id() {
    let hub = hub(&[(MODEL, Access::Gated, model())]);
    let workshop = Workshop::new(20);
    fs::create_dir(workshop.path("org")).unwrap();
    super::support::copy_dir(&fixture("example/target"), &workshop.path(MODEL));
    succeeds(&output(&workshop, &hub.endpoint, &perplexity(MODEL)));
    assert!(hub.requests().is_empty());
}

#[test]
fn a_download_that_breaks_off_is_an_error_and_goes_on_where_it_was() {
    let hub = hub(&[(MODEL, Access::Cut, model())]);
    let workshop = Workshop::new(20);
    let local = fixture("example/target");
    let expected = workshop.prints(&perplexity(local.to_str().unwrap()));
    let broken = output(&workshop, &hub.endpoint, &perplexity(MODEL));
    let error = stderr(&broken);
    assert_eq!(broken.status.code(), Some(1), "{error}");
    assert!(
        error.contains(MODEL) && error.contains("try again"),
        "{error}"
    );
    let offline = command(&workshop, &hub.endpoint, &perplexity(MODEL))
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert_eq!(offline.status.code(), Some(1), "half a model was used");
    assert_eq!(
        succeeds(&output(&workshop, &hub.endpoint, &perplexity(MODEL))),
        expected
    );
    let half = format!("bytes={}-", model()["model.safetensors"].len() / 2);
    let ranges = hub
        .requests()
        .into_iter()
        .filter_map(|request| request.range);
    assert!(
        ranges.into_iter().any(|range| range == half),
        "all was fetched again"
    );
}
