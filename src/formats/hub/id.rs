//! The names of repositories.

use std::fmt;

/// The id of a repository on the hub: `org/name`, or `org/name@revision` with a branch, a tag or
/// a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    /// `org/name`.
    pub name: String,
    /// What follows `@`.
    pub revision: Option<String>,
}

impl Id {
    /// The id that a text is, where it can be one.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let (org, repository) = name.split_once('/')?;
        let valid = is_name(org) && is_name(repository) && revision.is_none_or(is_revision);
        valid.then(|| Self {
            name: name.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }

    pub(super) fn revision_or_main(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// What the hub allows as a name; it begins and ends with neither point nor dash.
fn is_name(text: &str) -> bool {
    let known = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    let edge = |c: Option<&u8>| c.is_some_and(|&c| c != b'.' && c != b'-');
    let bytes = text.as_bytes();
    bytes.iter().all(|&c| known(c))
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.len() <= 96
        && !text.contains("..")
        && !text.contains("--")
}

/// A revision may hold slashes, as `refs/pr/1` does.
fn is_revision(text: &str) -> bool {
    text.split('/').all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for (text, name, revision) in [
            ("org/name", "org/name", None),
            (
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                None,
            ),
            ("a_b/c.d@v1.0", "a_b/c.d", Some("v1.0")),
            ("org/name@refs/pr/1", "org/name", Some("refs/pr/1")),
        ] {
            let id = Id::parse(text).unwrap();
            assert_eq!((id.name.as_str(), id.revision.as_deref()), (name, revision));
            assert_eq!(id.to_string(), text);
        }
        for text in [
            "",
            "name",
            "/name",
            "org/",
            "a/b/c",
            "./name",
            "../name",
            "org/..",
            "~/name",
            "org/na me",
            "org/name@",
            "org/name@../x",
            "org/name@/x",
            "org/a--b",
            "org\\name",
            "org/name?x",
            "org/n%C3%A4me",
            "org/.name",
            "https://org/name",
        ] {
            assert_eq!(Id::parse(text), None, "{text}");
        }
    }
}
