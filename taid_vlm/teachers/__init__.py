"""Where a teacher's signal comes from: a batch in, next-token laws at the aligned positions out."""

from taid_vlm.teachers.cache import CachedTeacher, TeacherCache
from taid_vlm.teachers.local import LocalTeacher
from taid_vlm.teachers.served import ServedTeacher, TeacherLost
from taid_vlm.teachers.shared import SharedTeacher, TeacherInStudent
from taid_vlm.teachers.signal import HiddenSignal, SparseSignal, Teacher

__all__ = ["CachedTeacher", "HiddenSignal", "LocalTeacher", "ServedTeacher", "SharedTeacher",
           "SparseSignal", "Teacher", "TeacherCache", "TeacherInStudent", "TeacherLost"]
