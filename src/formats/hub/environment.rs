//! Where repositories come from and where they are kept.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

const ENDPOINT: &str = "https://huggingface.co";

/// A hub and the cache of what was downloaded from it.
#[derive(Clone)]
pub struct Hub {
    /// Without a slash at its end.
    pub(super) endpoint: String,
    /// The folder that holds `models--org--name`.
    pub(super) cache: PathBuf,
    pub(super) token: Option<String>,
    pub(super) offline: bool,
}

impl Hub {
    /// As the environment has it.
    pub fn from_env() -> Self {
        Self::from_vars(&|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let text = |name| var(name).and_then(|value| value.into_string().ok());
        let path = |name| var(name).map(|value| expand(Path::new(&value)));
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| expand(Path::new("~/.cache")));
            cache.join("huggingface")
        });
        let token = || {
            let path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            fs::read_to_string(path).ok()
        };
        let token = text("HF_TOKEN").or_else(token);
        let token = token.map(|token| token.trim().to_owned());
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let cache = path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub"));
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: std::path::absolute(&cache).unwrap_or(cache),
            token: token.filter(|token| !token.is_empty()),
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
        }
    }
}

/// A path with `~` in front replaced by the user's folder.
fn expand(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Hub {
        Hub::from_vars(&|name| {
            let value = vars.iter().find(|(given, _)| *given == name)?.1;
            Some(value.into())
        })
    }

    #[test]
    fn the_environment_means_what_it_means_to_the_python_tools() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let path = home.path().to_str().unwrap();
        let stored = hub(&[("HF_HOME", path)]);
        assert_eq!(stored.cache, home.path().join("hub"));
        assert_eq!(stored.token.as_deref(), Some("hf_file"));
        assert_eq!(stored.endpoint, ENDPOINT);
        assert!(!stored.offline);
        let given = hub(&[
            ("HF_HOME", path),
            ("HF_HUB_CACHE", "/elsewhere"),
            ("HF_TOKEN", "hf_given"),
            ("HF_ENDPOINT", "http://127.0.0.1:1/"),
            ("HF_HUB_OFFLINE", "yes"),
        ]);
        assert_eq!(given.cache, Path::new("/elsewhere"));
        assert_eq!(given.token.as_deref(), Some("hf_given"));
        assert_eq!(given.endpoint, "http://127.0.0.1:1");
        assert!(given.offline);
        let xdg = hub(&[("XDG_CACHE_HOME", "/xdg"), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!(xdg.cache, Path::new("/xdg/huggingface/hub"));
        assert!(!xdg.offline);
    }
}
