//! Models, adapters, SAEs and data by their hub ids, from a hub on this machine: what is fetched,
//! what the cache is good for, and what is said where there is nothing to be had.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::support::{Workshop, fixture, stderr};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "org/tiny";

/// How the hub answers for a repository.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    Open,
    /// The listing is public, the files are not.
    Gated,
    /// The connection ends in the middle of the largest file, the first time.
    Cut,
}

type Files = BTreeMap<String, Vec<u8>>;

/// Repositories by the path that their files have on the hub: `org/name`, `datasets/org/name`.
#[derive(Default)]
struct Repositories(BTreeMap<String, (Access, Files)>);

impl Repositories {
    fn add(&mut self, path: &str, access: Access, files: Files) {
        self.0.insert(path.to_owned(), (access, files));
    }

    /// Status, headers and body for a request.
    fn answer(&self, path: &str, from: Option<usize>) -> (u16, Vec<String>, Vec<u8>) {
        let nothing = |status| (status, Vec::new(), Vec::new());
        if let Some(rest) = path.strip_prefix("/api/") {
            // models/org/name/revision/main, datasets/org/name/revision/main
            let path = rest.strip_prefix("models/").unwrap_or(rest);
            let Some((name, revision)) = path.split_once("/revision/") else {
                return nothing(400);
            };
            let Some((_, files)) = self.0.get(name) else {
                // As the real one answers who shows no token.
                return nothing(401);
            };
            if !["main", "v1", COMMIT].contains(&revision) {
                let code = "X-Error-Code: RevisionNotFound".to_owned();
                return (404, vec![code], Vec::new());
            }
            let names = files.keys().map(|name| json!({ "rfilename": name }));
            let names: Vec<Value> = names
                .chain([json!({ "rfilename": "../../evil" })])
                .collect();
            let body = json!({ "sha": COMMIT, "siblings": names }).to_string();
            return (200, Vec::new(), body.into_bytes());
        }
        let Some((name, rest)) = path[1..].split_once("/resolve/") else {
            return nothing(400);
        };
        let file = rest.split_once('/').map_or("", |(_, file)| file);
        match self.0.get(name) {
            Some((Access::Gated, _)) => nothing(403),
            Some((_, files)) if files.contains_key(file) => {
                let bytes = &files[file];
                let from = from.unwrap_or(0);
                let headers = vec![
                    format!("ETag: \"{:x}\"", file.len() * 1_000_003 + bytes.len()),
                    format!("X-Repo-Commit: {COMMIT}"),
                    format!(
                        "Content-Range: bytes {from}-{}/{}",
                        bytes.len() - 1,
                        bytes.len()
                    ),
                ];
                (206, headers, bytes[from..].to_vec())
            }
            _ => nothing(404),
        }
    }
}

/// What was asked for.
#[derive(Clone)]
struct Request {
    path: String,
    token: Option<String>,
    range: Option<String>,
}

type Requests = Arc<Mutex<Vec<Request>>>;

/// A hub on loopback; it ends with the test's process.
struct HubServer {
    endpoint: String,
    requests: Requests,
}

impl HubServer {
    fn start(repositories: Repositories) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Requests::default();
        let log = requests.clone();
        std::thread::spawn(move || {
            let mut cut = false;
            for stream in listener.incoming() {
                serve(stream.unwrap(), &repositories, &log, &mut cut);
            }
        });
        Self { endpoint, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The names of the files whose bytes were asked for.
    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .requests()
            .iter()
            .filter_map(|request| Some(request.path.split_once("/resolve/main/")?.1.to_owned()))
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

/// Answers one request and closes.
fn serve(mut stream: TcpStream, repositories: &Repositories, log: &Requests, cut: &mut bool) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines
        .map_while(|line| line.ok().filter(|line| !line.is_empty()))
        .collect();
    let header = |name: &str| {
        let of = |line: &String| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then(|| value.to_owned())
        };
        headers.iter().find_map(of)
    };
    let range = header("Range");
    log.lock().unwrap().push(Request {
        path: path.clone(),
        token: header("Authorization"),
        range: range.clone(),
    });
    let (from, to) = range
        .as_deref()
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
        .unzip();
    let (status, more, mut body) = repositories.answer(&path, from.map(|n| n.parse().unwrap()));
    if to == Some("0") {
        body.truncate(1);
    }
    let length = body.len();
    let wants_cut = repositories.0.iter().any(|(name, (access, _))| {
        *access == Access::Cut && path.starts_with(&format!("/{name}/resolve/"))
    });
    if wants_cut && path.ends_with("model.safetensors") && length > 1 && !*cut {
        *cut = true;
        body.truncate(length / 2);
    }
    let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
    let head = format!(
        "HTTP/1.1 {status} Here\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body);
}

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
