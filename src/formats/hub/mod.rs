//! Repositories of the Hugging Face hub, by their ids: found in the cache that the Python tools
//! keep, or downloaded into it.
//!
//! `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE` mean
//! what they mean to those. What exists on this machine under the name that was given wins over
//! an id. Of a repository only the files that the engine reads are downloaded.

mod environment;
mod files;
mod id;

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde_json::Value;

use crate::data::records::is_data;
use crate::error::{Error, Result};
pub use environment::Hub;
pub use id::Id;

/// What is looked for in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A model with its tokenizer.
    Model,
    /// A PEFT adapter.
    Adapter,
    /// An adapter where the repository has one, else a model.
    ModelOrAdapter,
    /// SAEs as sparsify lays them out: of one layer, or of all that are there.
    Sae(Option<usize>),
    /// The training split of a data set.
    Data,
}

/// What a listener hears while a repository is fetched.
#[derive(Clone, Debug, PartialEq)]
pub enum News<'a> {
    /// A file of so many bytes is downloaded.
    File {
        /// The repository and the file, in words.
        name: &'a str,
        /// Its size.
        bytes: u64,
    },
    /// So many bytes of it are here.
    Bytes(u64),
    /// The hub cannot be asked, so the copy in the cache is taken.
    Stale(&'a str),
}

/// Hears of downloads.
pub type Listener<'a> = &'a mut dyn FnMut(News);

/// The folder that `given` names: a local one, or the snapshot of a hub id in the cache.
///
/// # Errors
/// [`Error::Hub`] where `given` is neither, the repository cannot be had, or it lacks what is
/// wanted.
pub fn folder(given: &Path, want: Want, listener: Listener) -> Result<PathBuf> {
    Ok(match given.exists() {
        true => given.to_owned(),
        false => {
            Hub::from_env()
                .fetch(&id_of(given, "folder")?, want, listener)?
                .0
        }
    })
}

/// The files of the data that `given` names: a local file, or the training split of a data set on
/// the hub (Parquet, JSON Lines or JSON files, all in one folder of the repository).
///
/// # Errors
/// As [`folder`].
pub fn data(given: &Path, listener: Listener) -> Result<Vec<PathBuf>> {
    // A mistyped file is not worth asking the hub for.
    let is_file_name = given.to_str().is_some_and(is_data);
    if given.exists() || is_file_name {
        return Ok(vec![given.to_owned()]);
    }
    let id = id_of(given, "file")?;
    let (snapshot, files) = Hub::from_env().fetch(&id, Want::Data, listener)?;
    Ok(files.iter().map(|name| snapshot.join(name)).collect())
}

fn id_of(given: &Path, local: &str) -> Result<Id> {
    given.to_str().and_then(Id::parse).ok_or_else(|| {
        let what = format!("found no such {local}, and it is no hub id (org/name)");
        Error::file(given, what)
    })
}

/// Why the hub gave no answer that could be used.
enum Trouble {
    /// It could not be asked; the cache may do.
    Unreachable(String),
    /// It was asked and said no, or something that makes no sense.
    Refused(String),
}

impl Hub {
    /// The snapshot of a repository with what is wanted in it, and the names of these files.
    fn fetch(&self, id: &Id, want: Want, listener: Listener) -> Result<(PathBuf, Vec<String>)> {
        let fail = |what: String| Error::hub(id.to_string(), what);
        let kind = match want {
            Want::Data => RepoType::Dataset,
            _ => RepoType::Model,
        };
        let repo = Repo::with_revision(id.name.clone(), kind, id.revision_or_main().to_owned());
        let cached = Cache::new(self.cache.clone()).repo(repo.clone());
        let why = match self.offline {
            true => "HF_HUB_OFFLINE is set".to_owned(),
            false => match self.download(id, &repo, &cached, want, &mut *listener) {
                Ok(found) => return Ok(found),
                Err(Trouble::Refused(why)) => return Err(fail(why)),
                Err(Trouble::Unreachable(why)) => why,
            },
        };
        let found = self.cached(id, &repo, want).map_err(|missing| {
            fail(format!(
                "no such path here; {why}, and the cache in {} has {missing}: fetch it where there \
                 is a network, or give a local path",
                self.cache.display()
            ))
        })?;
        if !self.offline {
            listener(News::Stale(&format!("{id}: {why}; taken from the cache")));
        }
        Ok(found)
    }

    /// Asks the hub what the repository holds, and downloads what is wanted and not there yet.
    fn download(
        &self,
        id: &Id,
        repo: &Repo,
        cached: &CacheRepo,
        want: Want,
        listener: Listener,
    ) -> std::result::Result<(PathBuf, Vec<String>), Trouble> {
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_user_agent("resa-engine", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| Trouble::Refused(e.to_string()))?
            .repo(repo.clone());
        let (commit, names) = self.ask(&api)?;
        let snapshot = cached.pointer_path(&commit);
        let mut get = |name: &str| -> std::result::Result<(), Trouble> {
            let path = snapshot.join(name);
            if path.exists() {
                return Ok(());
            }
            let title = format!("{name} of {id}");
            let meter = Meter {
                title: &title,
                size: None,
                done: 0,
                listener: &mut *listener,
            };
            let got = api
                .download_with_progress(name, meter)
                .map_err(|error| self.trouble(id, name, &error))?;
            match got == path {
                true => Ok(()),
                false => Err(Trouble::Refused(
                    "changed while it was downloaded; try again".to_owned(),
                )),
            }
        };
        let mut files = files::wanted(want, &names).map_err(Trouble::Refused)?;
        for name in &files {
            get(name)?;
        }
        let shards = files::shards(&snapshot, &files).map_err(Trouble::Refused)?;
        for name in &shards {
            get(name)?;
        }
        files.extend(shards);
        if repo.revision() != commit {
            let known = cached.create_ref(&commit);
            known.map_err(|e| Trouble::Refused(format!("{}: {e}", self.cache.display())))?;
        }
        Ok((snapshot, files))
    }

    /// The commit of a repository's revision, and the names of its files.
    fn ask(&self, api: &ApiRepo) -> std::result::Result<(String, Vec<String>), Trouble> {
        let endpoint = &self.endpoint;
        let unreachable = |error: ureq::Error| {
            Trouble::Unreachable(format!("{endpoint} cannot be reached ({error})"))
        };
        let request = api.info_request().config().http_status_as_error(false);
        let mut answer = request.build().call().map_err(unreachable)?;
        let status = answer.status().as_u16();
        let code = answer.headers().get("x-error-code");
        let code = code.and_then(|code| code.to_str().ok()).unwrap_or_default();
        let says = match code {
            "" => format!("{endpoint} says HTTP {status}"),
            code => format!("{endpoint} says HTTP {status}, {code}"),
        };
        match status {
            200 => {}
            404 if code == "RevisionNotFound" => {
                return Err(Trouble::Refused(format!(
                    "it has no such revision ({says})"
                )));
            }
            401 | 403 | 404 => {
                let what = "no such path here, and no such repository on the hub, or a private one";
                let advice = self.token_advice();
                return Err(Trouble::Refused(format!(
                    "{what} ({says}): check the name{advice}"
                )));
            }
            500.. => return Err(Trouble::Unreachable(says)),
            _ => return Err(Trouble::Refused(says)),
        }
        let body = answer.body_mut().read_to_string().map_err(unreachable)?;
        parse_listing(&body).ok_or_else(|| {
            let what = "expected sha and siblings in its answer, found neither or one of them";
            Trouble::Refused(format!("{endpoint}: {what}"))
        })
    }

    fn token_advice(&self) -> &'static str {
        match self.token {
            Some(_) => ", or use a token (HF_TOKEN) that may read it",
            None => ", or set HF_TOKEN to a token that may read it",
        }
    }

    /// What an error of a download means.
    fn trouble(&self, id: &Id, name: &str, error: &ApiError) -> Trouble {
        let status = match error {
            ApiError::RequestError(error) => match **error {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            _ => None,
        };
        Trouble::Refused(match status {
            Some(status @ (401 | 403)) => format!(
                "{name}: access is gated (HTTP {status}): ask for it at {}/{}{}",
                self.endpoint,
                id.name,
                self.token_advice().replace(", or", ", then")
            ),
            // A download that was stopped between its last byte and its end cannot go on.
            Some(416) => format!(
                "{name}: {error}: remove the .part files from the blobs of this repository in {} \
                 and try again",
                self.cache.display()
            ),
            _ => format!("{name}: {error}; what has arrived is kept, try again"),
        })
    }

    /// What is wanted, from the cache alone; else what the cache has of it, in words.
    fn cached(
        &self,
        id: &Id,
        repo: &Repo,
        want: Want,
    ) -> std::result::Result<(PathBuf, Vec<String>), String> {
        let revision = id.revision_or_main();
        let root = self.cache.join(repo.folder_name());
        // What no branch or tag is named like is a commit.
        let commit = fs::read_to_string(root.join("refs").join(revision));
        let commit = commit.unwrap_or_else(|_| revision.to_owned());
        let commit = commit.trim();
        let snapshot = root.join("snapshots").join(commit);
        if !is_commit(commit) || !snapshot.is_dir() {
            return Err("nothing of it".to_owned());
        }
        let names = files::below(&snapshot);
        let mut files = files::wanted(want, &names)
            .map_err(|missing| format!("a part of it alone ({missing})"))?;
        let shards = files::shards(&snapshot, &files)?;
        if let Some(missing) = shards.iter().find(|name| !snapshot.join(name).exists()) {
            return Err(format!("a part of it alone (no {missing})"));
        }
        files.extend(shards);
        Ok((snapshot, files))
    }
}

/// Commit and file names in what the hub says of a repository. Names that would lead out of its
/// folder are left out.
fn parse_listing(body: &str) -> Option<(String, Vec<String>)> {
    let body: Value = serde_json::from_str(body).ok()?;
    let commit = body["sha"].as_str().filter(|sha| is_commit(sha))?;
    let siblings = body["siblings"].as_array()?.iter();
    let names = siblings.filter_map(|file| file["rfilename"].as_str());
    let names = names.filter(|name| super::is_inside(Path::new(name)));
    Some((commit.to_owned(), names.map(str::to_owned).collect()))
}

/// Whether a text can be a commit, and is a safe name of a folder.
fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric())
}

/// Tells a listener how far a file has come.
struct Meter<'a> {
    title: &'a str,
    size: Option<u64>,
    done: u64,
    listener: Listener<'a>,
}

impl Progress for Meter<'_> {
    /// Called before a download, and again before each try.
    fn init(&mut self, size: usize, _: &str) {
        self.done = 0;
        if self.size.is_none() {
            self.size = Some(size as u64);
            (self.listener)(News::File {
                name: self.title,
                bytes: size as u64,
            });
        }
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.listener)(News::Bytes(self.done));
    }

    fn finish(&mut self) {}
}
