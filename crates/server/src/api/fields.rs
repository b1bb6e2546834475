use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of a request's body. Each is taken by name; what nobody took is refused by name, so that
/// nothing a client asks for is silently ignored.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body, which has to be a JSON object. A field that is null is one that is not there.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(mut fields)) => {
                fields.retain(|_, value| !value.is_null());
                Ok(Self(fields))
            }
            Ok(_) => Err(ApiError::bad_request("the body is JSON, but not an object")),
            Err(error) => Err(ApiError::bad_request(format!("the body is not JSON: {error}"))),
        }
    }

    /// Takes a field, if it is there.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        serde_path_to_error::deserialize(value).map(Some).map_err(|error| {
            let path = error.path().to_string();
            let place = match path.as_str() {
                "." => name.to_owned(),
                path if path.starts_with('[') => format!("{name}{path}"),
                path => format!("{name}.{path}"),
            };
            ApiError::field(place, error.into_inner())
        })
    }

    /// Takes a field that has to be an object: of a list, serde would take the members in their order.
    pub(crate) fn object<T: DeserializeOwned>(
        &mut self,
        name: &str,
    ) -> Result<Option<T>, ApiError> {
        match self.0.get(name) {
            Some(value) if !value.is_object() => Err(ApiError::field(name, "expected an object")),
            _ => self.take(name),
        }
    }

    /// A field that nobody took yet.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Takes a field that has to be there.
    pub(crate) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::field(name, "this field is required"))
    }

    /// Takes a number for which `fits` holds.
    pub(crate) fn number<T: DeserializeOwned + Copy>(
        &mut self,
        name: &str,
        fits: impl Fn(T) -> bool,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let value = self.take(name)?;
        match value {
            Some(value) if !fits(value) => {
                Err(ApiError::field(name, format!("expected {expected}")))
            }
            value => Ok(value),
        }
    }

    /// Drops fields that say something about the request and do not change what comes of it: texts, and
    /// objects of texts.
    pub(crate) fn drop_notes(&mut self, names: &[&str]) -> Result<(), ApiError> {
        for &name in names {
            match self.0.remove(name) {
                None | Some(Value::String(_) | Value::Object(_)) => {}
                Some(_) => return Err(ApiError::field(name, "expected text, or an object")),
            }
        }
        Ok(())
    }

    /// Takes a field of which only some values can be served.
    pub(crate) fn only(&mut self, name: &str, served: &[Value]) -> Result<(), ApiError> {
        match self.0.remove(name) {
            Some(value) if !served.contains(&value) => {
                let served: Vec<String> = served.iter().map(ToString::to_string).collect();
                let served = served.join(" or ");
                let problem = match served.is_empty() {
                    true => "this server does not support it".to_owned(),
                    false => format!("this server supports {served} only"),
                };
                Err(ApiError::field(name, problem))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a field that says nothing without another one.
    pub(crate) fn only_with(&self, name: &str, other: &str) -> Result<(), ApiError> {
        match self.get(name) {
            Some(_) => Err(ApiError::field(name, format!("it needs `{other}`"))),
            None => Ok(()),
        }
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::field(name, "this server does not know the field")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[track_caller]
    fn check<T>(result: Result<T, ApiError>, expected: &str) {
        let error = result.err().expect("it is refused");
        assert!(error.message.contains(expected), "{}", error.message);
    }

    #[test]
    fn what_is_wrong_is_named() {
        check(Fields::parse(b"{"), "not JSON");
        check(Fields::parse(b"[]"), "not an object");
        check(Fields::parse("[".repeat(100_000).as_bytes()), "recursion limit");
        let mut f = fields(&json!({ "n": "two", "top_p": 7.0, "list": [{"a": 1}, {"a": "x"}] }));
        check(f.take::<u32>("n"), "`n`: invalid type");
        check(f.number("top_p", |p: f32| p <= 1.0, "at most 1"), "`top_p`: expected at most 1");
        type List = Vec<std::collections::BTreeMap<String, u32>>;
        check(f.take::<List>("list"), "`list[1].a`");
        check(f.require::<u32>("gone"), "`gone`: this field is required");
        check(fields(&json!({ "mystery": 1 })).finish(), "`mystery`");
        check(fields(&json!({ "store": true })).only("store", &[false.into()]), "`store`");
        assert!(fields(&json!({ "mystery": null })).finish().is_ok(), "null is not there");
    }
}
