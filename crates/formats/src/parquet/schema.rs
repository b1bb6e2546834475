//! Columns out of a schema: what repeats and what may be missing on the way to a leaf.

use super::thrift::Result;

/// A node of the schema, as stored: depth first, each with the number of its children.
#[derive(Debug, Default)]
pub(super) struct SchemaElement {
    pub(super) name: String,
    /// The type of a leaf; 6 is BYTE_ARRAY.
    pub(super) physical: Option<i64>,
    /// 0 required, 1 optional, 2 repeated.
    pub(super) repetition: i64,
    pub(super) children: u64,
}

/// A column of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    /// The topmost field's name.
    pub(super) top: String,
    /// The field of a list's structs; `None` for plain strings.
    pub(super) field: Option<String>,
    /// Its place among the schema's leaves.
    pub(super) leaf: usize,
    /// The definition level of a value that is there.
    pub(super) max_definition: u32,
    /// The definition level from which a list has an element; `None` for what is no list.
    pub(super) element_definition: Option<u32>,
}

const BYTE_ARRAY: i64 = 6;
const OPTIONAL: i64 = 1;
const REPEATED: i64 = 2;
/// Structs in structs.
const MAX_DEPTH: usize = 32;
const MAX_LEAVES: usize = 100_000;

/// The columns of strings, of lists of strings, and of lists of structs of strings; and the names on the paths to
/// strings that lie deeper.
pub(super) fn text_columns(schema: &[SchemaElement]) -> Result<(Vec<Column>, Vec<Vec<String>>)> {
    let (root, nodes) = schema.split_first().ok_or("it has no schema")?;
    let (mut columns, mut deeper) = (Vec::new(), Vec::new());
    // The path to the node, and the children that are still to come of each node on it.
    let mut path: Vec<(&SchemaElement, u64)> = vec![(root, root.children)];
    let mut leaf = 0;
    for node in nodes {
        while path.last().is_some_and(|(_, left)| *left == 0) {
            path.pop();
        }
        let (_, left) = path.last_mut().ok_or("its schema has more nodes than it announces")?;
        *left -= 1;
        path.push((node, node.children));
        if path.len() > MAX_DEPTH {
            return Err("its schema is nested too deeply".to_owned());
        }
        if node.children > 0 {
            continue;
        }
        let nodes: Vec<&SchemaElement> = path[1..].iter().map(|(node, _)| *node).collect();
        match column(&nodes, leaf) {
            Some(column) => columns.push(column),
            None if node.physical == Some(BYTE_ARRAY) => {
                deeper.push(nodes.iter().map(|node| node.name.clone()).collect());
            }
            None => {}
        }
        leaf += 1;
        if leaf > MAX_LEAVES {
            return Err(format!("its schema has more than {MAX_LEAVES} columns"));
        }
    }
    match path.iter().all(|(_, left)| *left == 0) {
        true => Ok((columns, deeper)),
        false => Err("its schema has less nodes than it announces".to_owned()),
    }
}

/// The column of a leaf; `None` where it is no text that bevel reads.
fn column(path: &[&SchemaElement], leaf: usize) -> Option<Column> {
    let (last, top) = (path.last()?, path.first()?);
    if last.physical != Some(BYTE_ARRAY) {
        return None;
    }
    let raises = |node: &&&SchemaElement| [OPTIONAL, REPEATED].contains(&node.repetition);
    let max_definition = path.iter().filter(raises).count() as u32;
    let mut lists = (0..path.len()).filter(|&i| path[i].repetition == REPEATED);
    let (list, second) = (lists.next(), lists.next());
    let (field, element_definition) = match (list, second) {
        (_, Some(_)) => return None,
        (None, _) if path.len() == 1 => (None, None),
        (None, _) => return None,
        (Some(list), None) => {
            let element = path[..=list].iter().filter(raises).count() as u32;
            let field = match (&path[list + 1..], path[list].children) {
                _ if list > 1 => return None,
                // A repeated string.
                ([], _) => None,
                // The list's elements are the strings.
                ([_], 1) => None,
                // Old writers have no node between a list and its elements' fields.
                ([field], _) | ([_, field], 1) => Some(field.name.clone()),
                _ => return None,
            };
            (field, Some(element))
        }
    };
    Some(Column { top: top.name.clone(), field, leaf, max_definition, element_definition })
}
