//! A hub on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// The commit that every branch of a repository points to.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub answers for a repository.
#[derive(Clone, Copy, PartialEq)]
pub enum Access {
    Open,
    /// The listing is public, the files are not.
    Gated,
    /// The connection ends in the middle of the largest file, the first time.
    Cut,
}

pub type Files = BTreeMap<String, Vec<u8>>;

/// Repositories by the path that their files have on the hub: `org/name`, `datasets/org/name`.
#[derive(Default)]
pub struct Repositories(BTreeMap<String, (Access, Files)>);

impl Repositories {
    pub fn add(&mut self, path: &str, access: Access, files: Files) {
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
pub struct Request {
    pub path: String,
    pub token: Option<String>,
    pub range: Option<String>,
}

type Requests = Arc<Mutex<Vec<Request>>>;

/// A hub on loopback; it ends with the test's process.
pub struct HubServer {
    pub endpoint: String,
    requests: Requests,
}

impl HubServer {
    pub fn start(repositories: Repositories) -> Self {
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

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The names of the files whose bytes were asked for.
    pub fn files(&self) -> Vec<String> {
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
