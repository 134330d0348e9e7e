//! For the fuzz targets only: the variable's text, without the environment.

use super::{InheritError, Inherited};

/// Reads the text of `FLOTILLA_FDS`.
pub fn parse(text: &str) -> Result<Inherited, InheritError> {
    Inherited::parse(text)
}
